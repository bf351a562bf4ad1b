"""What the C++ kernels for CPUs share: the compiler driver, and how tensors are passed to them.

Torch's operators wait for all threads after each product, and pass every intermediate result
through memory. In these kernels a thread computes a piece of work from beginning to end.
"""
