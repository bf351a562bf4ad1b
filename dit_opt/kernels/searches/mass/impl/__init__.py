"""Implementations of sampled mass."""
