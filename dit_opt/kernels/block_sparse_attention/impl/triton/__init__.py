"""Block-sparse attention in Triton, for GPUs."""
