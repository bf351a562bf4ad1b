"""Attention kernels that never ran on a GPU: off unless `ditopt tune --variants` measured them."""
