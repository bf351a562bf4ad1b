"""Whether a place is changed, and how much: decisions by facts, options and cost; no rewrite."""
