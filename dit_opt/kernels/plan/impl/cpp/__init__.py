"""Budgets, lists and thresholds in C++."""
