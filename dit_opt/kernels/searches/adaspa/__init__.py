"""AdaSpa's search."""
