"""Layers that compute several operators as one, on devices with kernels for that.

:mod:`.ops` holds operators, :mod:`.functions` functions with gradients; :mod:`.choice` decides
which layers use them. :mod:`.same_bits` and :mod:`.cpu` do the same for a CPU, with the plain
layers' results, bit for bit.
"""
