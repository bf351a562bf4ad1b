"""The search in an order of the tokens for each head."""
