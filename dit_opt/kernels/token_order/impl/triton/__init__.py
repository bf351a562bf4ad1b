"""Moving tokens in Triton, for GPUs."""
