"""Measure the candidates of the attention kernel on the GPU of this machine."""
