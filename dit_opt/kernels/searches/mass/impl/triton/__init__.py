"""Sampled mass in Triton."""
