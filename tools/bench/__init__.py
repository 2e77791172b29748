"""Benchmarks: one file a stage, each beside its peers, with committed rows under ``results/``."""
