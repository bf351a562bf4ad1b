"""Measuring the candidates of kernels on this machine, and keeping the fastest."""
