"""Attention over packed rows, in place of a model's padded, masked attention."""
