"""Studies: many runs that differ in a few keys, and what their figures show together."""
