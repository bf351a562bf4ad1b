"""Models of the zoo with short sequences and small heads, so that any test may ask for a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from zoo import MODELS
from zoo.inputs import draw, fill
from zoo.record import B

TEXT_TOKENS = 7


@dataclass(frozen=True)
class TinyModel:
    """A model in eval mode, its inputs, and what the facts of its graph must say.

    `grid` is (T, H, W) in tokens, None where the graph cannot know it. `text_tokens` counts the
    text tokens of the joint sites (0 where text comes in by cross-attention only). `n_sites` counts
    all attention calls, self, joint and cross, the text refiner's included.
    """

    name: str
    model: torch.nn.Module
    inputs: dict[str, Any]
    grid: tuple[int, int, int] | None
    text_tokens: int
    n_sites: int

    def __call__(self, model: Callable[..., Any] | None = None) -> torch.Tensor:
        """Run `model` (by default the eager one) on the inputs without gradients."""
        with torch.no_grad():
            return (self.model if model is None else model)(**self.inputs)[0]


def wan(batch: int = 1, grid: tuple[int, int, int] = (3, 4, 5), layers: int = 2) -> TinyModel:
    config = {"num_layers": layers}
    return _build("wan", batch, grid, 0, 2 * layers, config, head_dim=24)


def break_apart(model: torch.nn.Module) -> torch.nn.Module:
    """Have Dynamo break a Wan where the timestep has been embedded and the tokens are made."""
    embedder = model.get_submodule("condition_embedder")
    inner = embedder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        torch._dynamo.graph_break()
        return out

    embedder.forward = forward
    return model


def hunyuan_video(
    batch: int = 1,
    grid: tuple[int, int, int] = (3, 4, 5),
    layers: int = 1,
    image_condition: str | None = None,
) -> TinyModel:
    """`image_condition="token_replace"` modulates the first frame apart from the others."""
    config = {
        "num_layers": layers,
        "num_single_layers": layers,
        "image_condition_type": image_condition,
    }
    return _build("hunyuan_video", batch, grid, TEXT_TOKENS, 2 * layers + 1, config)


def cogvideox(batch: int = 1, grid: tuple[int, int, int] = (3, 4, 5), layers: int = 2) -> TinyModel:
    return _build("cogvideox_rope", batch, grid, TEXT_TOKENS, layers, {"num_layers": layers})


def ltx_video(batch: int = 1, grid: tuple[int, int, int] = (3, 4, 5), layers: int = 2) -> TinyModel:
    return _build("ltx", batch, grid, 0, 2 * layers, {"num_layers": layers})


def flux(batch: int = 1, grid: tuple[int, int] = (4, 5), layers: int = 1) -> TinyModel:
    config = {"num_layers": layers, "num_single_layers": layers}
    tiny = _build("flux", batch, (1, *grid), TEXT_TOKENS, 2 * layers, config)
    return replace(tiny, grid=None)


def sd3(batch: int = 1, grid: tuple[int, int] = (4, 5), layers: int = 2) -> TinyModel:
    return _build("sd3", batch, (1, *grid), TEXT_TOKENS, layers + 1, {"num_layers": layers})


def qwen_image(
    batch: int = 1,
    pictures: tuple[tuple[int, int, int], ...] = ((1, 4, 5), (1, 4, 5)),
    layers: int = 1,
) -> TinyModel:
    """The first picture is made, the others are edited; text has no padding."""
    inputs = {
        "hidden_states": draw(B, sum(t * h * w for t, h, w in pictures), 8),
        "encoder_hidden_states_mask": fill(1, B, TEXT_TOKENS),
        "img_shapes": [list(pictures)] * batch,
    }
    grid = (sum(t for t, _, _ in pictures), *pictures[0][1:])
    tiny = _build("qwen", batch, grid, TEXT_TOKENS, layers, {"num_layers": layers}, inputs)
    return tiny if len({p[1:] for p in pictures}) == 1 else replace(tiny, grid=None)


def z_image(
    batch: int = 1, grid: tuple[int, int] = (4, 5), texts: tuple[int, ...] = (7,), layers: int = 1
) -> TinyModel:
    """Samples take their lengths of text from `texts` in turn; all are padded to 32 tokens."""
    h, w = grid
    inputs = {
        "x": [draw(4, 1, 2 * h, 2 * w)] * batch,
        "cap_feats": [draw(texts[i % len(texts)], 16) for i in range(batch)],
    }
    config = {"n_layers": layers}
    return _build("zimage", batch, (1, h, w), texts[0], layers + 2, config, inputs)


def dit(batch: int = 1, size: int = 6, layers: int = 2) -> TinyModel:
    """The model fixes the picture to size x size tokens."""
    return _build("dit", batch, (1, size, size), 0, layers, {"num_layers": layers})


ALL: tuple[Callable[..., TinyModel], ...] = (
    wan,
    hunyuan_video,
    cogvideox,
    ltx_video,
    flux,
    sd3,
    dit,
)


def _build(
    name: str,
    batch: int,
    grid: tuple[int, int, int],
    text_tokens: int,
    n_sites: int,
    config: Mapping[str, Any],
    inputs: Mapping[str, Any] | None = None,
    head_dim: int = 16,
) -> TinyModel:
    model, given = MODELS[name].build(batch, grid, TEXT_TOKENS, head_dim, config, inputs)
    return TinyModel(name, model, given, grid, text_tokens, n_sites)
