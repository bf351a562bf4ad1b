"""Implementations of block-sparse attention, by what they are written in."""
