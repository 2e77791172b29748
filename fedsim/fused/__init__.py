"""Layers that compute several operators as one, where the device has kernels for that.

:mod:`.ops` holds operators, :mod:`.functions` functions with gradients; :mod:`.choice` says which layers use them.
:mod:`.same_bits` and :mod:`.cpu` are the like for a CPU, whose results are those of the plain layers, bit for bit.
"""
