"""What the sparse kernel does not take: dtypes, shapes, scales, and sizes that no input tells.

Sizes are compared as expressions; comparing SymInts would add guards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dit_opt._compat import size_expression
from dit_opt.decisions import AttentionReason
from dit_opt.facts.layouts import Layout
from dit_opt.facts.nodes import example_of
from dit_opt.facts.sites import Site
from dit_opt.facts.sizes import are_equal, divide
from dit_opt.program.sizes import find_unknown_symbols

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = range(16, 257)


def find_limit(site: Site, layout: Layout | None) -> tuple[AttentionReason, str] | None:
    """Why the kernel does not take a call as it is written, or None."""
    tensors = (site.query, site.key, site.value)
    # Under autocast the call has another dtype than what it is given.
    dtypes = [example_of(n).dtype for n in (site.node, *tensors)]
    others = [str(dtype) for dtype in dtypes if dtype not in DTYPES]
    if others:
        return AttentionReason.UNSUPPORTED_DTYPE, others[0]
    shapes = [tuple(map(size_expression, example_of(n).shape)) for n in tensors]
    if not _is_grouped(*shapes):
        return AttentionReason.UNSUPPORTED_SHAPE, ", ".join(str(list(shape)) for shape in shapes)
    dims = list(dict.fromkeys(shape[-1] for shape in shapes))
    if len(dims) > 1 or not dims[0].is_Integer or int(dims[0]) not in HEAD_DIMS:
        return AttentionReason.UNSUPPORTED_HEAD_DIM, f"D={', '.join(map(str, dims))}"
    if site.scale is not None and not 0 < site.scale < math.inf:
        return AttentionReason.UNSUPPORTED_SCALE, f"scale={site.scale}"
    sizes = [size for shape in shapes for size in shape]
    if layout is not None:
        sizes += layout.grid.sizes if layout.grid else ()
        sizes += (layout.latents.start, layout.latents.stop) if layout.latents else ()
    unknown = find_unknown_symbols(site.node.graph, sizes)
    if unknown:
        return AttentionReason.UNSUPPORTED_SIZE, ", ".join(map(str, unknown))
    return None


def _is_grouped(query: Sequence, key: Sequence, value: Sequence) -> bool:
    """[B, N, D] or [B, H, N, D], one B, and as many query heads for each key head."""
    if len(query) not in (3, 4) or not len(query) == len(key) == len(value):
        return False
    if not are_equal(query[0], key[0]) or not are_equal(query[0], value[0]):
        return False
    if len(query) == 3:
        return True
    return are_equal(key[1], value[1]) and divide(query[1], key[1]) is not None
