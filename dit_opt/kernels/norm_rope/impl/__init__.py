"""Implementations of the attention prologue."""
