"""The search by the means of small cells."""
