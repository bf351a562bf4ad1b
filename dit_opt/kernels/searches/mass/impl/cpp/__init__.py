"""Sampled mass in C++."""
