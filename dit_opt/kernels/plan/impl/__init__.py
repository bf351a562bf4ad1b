"""Implementations of budgets, lists and thresholds."""
