"""The shipped demo: generated clips, the model trained on them, and the side-by-side run.

No hub can be assumed, so a small diffusers model with trained weights travels with the package.
"""
