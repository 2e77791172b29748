"""fedsim: a single-node, multi-GPU simulation engine for responsible federated LLMs (arXiv 2502.16691)."""

__version__ = "0.1.0"
