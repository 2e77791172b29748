"""One HTML page from finished runs."""
