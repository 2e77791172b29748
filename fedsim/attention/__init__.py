"""Attention over packed rows: what a model's layers call instead of padded, masked attention."""
