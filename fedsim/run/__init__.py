"""One run: checks, preparation, rounds, measurement."""
