"""Rehearsal of the CUDA path without a GPU: the product's own steps at 8B shapes on a fake device, every op counted."""
