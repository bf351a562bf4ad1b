"""Block-sparse attention by torch's operators, for CPUs."""
