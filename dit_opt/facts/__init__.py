"""Facts: what a graph proves about itself, as pure functions that rewrite nothing.

Passes read them, so that no model needs an adapter.
"""
