"""Tensor-to-tensor kernels and the searches that feed them.

Nothing in here knows a graph: a kernel can be called, tested and timed with plain tensors.
"""
