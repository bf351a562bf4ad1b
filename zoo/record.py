"""What the zoo holds: records that say how to build a tiny model and what to call it with.

Sizes in a record are symbols, so that one record serves long sequences in `benchmarks.coverage` and
short ones in the tests. T, H and W all differ, so that a swap of two grid axes shows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

# Batch, grid in tokens, text tokens, size of a head.
B, T, H, W, TEXT, D = sympy.symbols("B T H W TEXT D", integer=True, positive=True)
TOKENS = T * H * W
HEADS = {"num_attention_heads": 2, "attention_head_dim": D}
# How rotary positions share the channels of a head among three axes.
ROPE = (D / 4, 3 * D / 8, 3 * D / 8)


@dataclass(frozen=True)
class Call:
    """A function, or where to import it from ("module:name"), to be called with known sizes."""

    function: Callable[..., Any] | str
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Model:
    """A tiny diffusers transformer.

    Attributes:
        name: unique in the zoo.
        class_name: of its class in diffusers, which is imported when the model is built.
        note: what is special about it.
        config: arguments of the class; sizes may be symbols.
        inputs: arguments of a call; sizes may be symbols, tensors are `Call`s.
        grid: (T, H, W) in tokens, unless `build` is asked for another.
        prepare: what has to be done before the class can be used.
    """

    name: str
    class_name: str
    note: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    grid: tuple[int, int, int]
    prepare: Callable[[], None] | None = None

    def build(
        self,
        batch: int = 1,
        grid: tuple[int, int, int] | None = None,
        text: int = 40,
        head_dim: int = 32,
        config: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The model in eval mode and inputs to which it answers with a tuple; always the same ones.

        `config` and `inputs` replace or add to those of the record.
        """
        sizes = dict(zip((B, T, H, W, TEXT, D), (batch, *(grid or self.grid), text, head_dim)))
        if self.prepare is not None:
            self.prepare()
        make = getattr(importlib.import_module("diffusers"), self.class_name)
        with torch.random.fork_rng(devices=[]):
            # Buffers may be random, too.
            torch.manual_seed(0)
            model = make(**resolve({**self.config, **(config or {})}, sizes))
        seed_weights(model)
        model.eval().requires_grad_(False)
        given = resolve({**self.inputs, **(inputs or {})}, sizes)
        return model, {**given, "return_dict": False}


def resolve(value: Any, sizes: Mapping[sympy.Symbol, int]) -> Any:
    """`value` with numbers for symbols and results for calls, inside of containers, too."""
    if isinstance(value, dict):
        return {key: resolve(item, sizes) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(resolve(item, sizes) for item in value)
    if isinstance(value, sympy.Expr):
        return _compute(value, sizes)
    if isinstance(value, Call):
        function = value.function
        if isinstance(function, str):
            module, name = function.split(":")
            function = getattr(importlib.import_module(module), name)
        arguments = resolve(value.arguments, sizes)
        return function(*arguments, **resolve(value.keywords or {}, sizes))
    return value


def _compute(size: sympy.Expr, sizes: Mapping[sympy.Symbol, int]) -> int:
    number = size.subs(list(sizes.items()))
    if not number.is_Integer:
        raise ValueError(f"The size {size} is {number}, not whole, for {sizes}; choose others.")
    return int(number)


@torch.no_grad()
def seed_weights(model: torch.nn.Module) -> None:
    """Draw all weights: zero-initialised gates would make the blocks vanish and hide errors."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        # Matrices keep the scale of their inputs; vectors (norms, biases) sit near one half.
        noise = torch.randn(parameter.shape, generator=generator)
        flat = parameter.dim() <= 1
        fan_in = 1 if flat else max(1, parameter[0].numel())
        parameter.copy_(0.5 + 0.1 * noise if flat else noise * fan_in**-0.5)
