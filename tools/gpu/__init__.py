"""The first session on a GPU: ``python -m tools.gpu --help``; docs/gpu.md says what each call measures."""
