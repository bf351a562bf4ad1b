"""What searches share: blocks, budgets and thresholds, lists, packed plans, the guard."""
