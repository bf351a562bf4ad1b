"""The attention prologue in Triton, for GPUs."""
