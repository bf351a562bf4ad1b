"""Tiny diffusion transformers with seeded weights and inputs, for the tests and benchmarks."""

from zoo.images import IMAGES
from zoo.record import Model
from zoo.video import VIDEO

MODELS: dict[str, Model] = {model.name: model for model in (*VIDEO, *IMAGES)}
