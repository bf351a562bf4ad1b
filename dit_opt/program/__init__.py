"""Programs: the graph that passes edit, its slots (tensors that outlive a call) and its pieces."""
