"""Layers that compute several operators as one, where the device has kernels for that.

:mod:`.ops` holds operators, :mod:`.functions` functions with gradients; :mod:`.choice` says which layers use them.
"""
