"""Implementations of moving tokens."""
