"""One script per question: each prints a table and can write its numbers as JSON."""
