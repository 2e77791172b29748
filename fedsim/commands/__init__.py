"""Commands of ``fedsim``, one module each; ``main`` takes the words behind the command's name."""
