"""What a site would cost, dense and sparse: the work of each router, for the cost model."""

from __future__ import annotations

import functools

import torch

from dit_opt._compat import size_expression
from dit_opt.facts.sites import Site
from dit_opt.options import Options
from dit_opt.policy import cost
from dit_opt.routers import find_router
from dit_opt.routers.base import BLOCK_K, BLOCK_Q

# Own tokens of a block of queries, and the heaviest blocks that `allot_blocks` leaves every row.
_LEAST_KEYS = BLOCK_Q + 2 * BLOCK_K
# Of a step that unpacks lists and moves queries, keys, values and the output.
_STEP_OPERATORS = 15
_MOVED = 4


def predict_site(site: Site, options: Options) -> cost.Prediction:
    """Times of one call of a site by the options' router; a batch of unknown size counts as one,
    since more of it only pays sooner."""
    assert site.query is not None
    example = site.query.meta["example_value"]
    heads = 1
    for size in map(size_expression, example.shape[:-2]):
        heads *= int(size) if size.is_Integer else 1
    dim = int(example.shape[-1])
    return predict_attention(heads, dim, example.element_size(), example.device, options)


@functools.lru_cache(maxsize=64)
def predict_attention(
    heads: int, dim: int, itemsize: int, device: torch.device, options: Options
) -> cost.Prediction:
    """Times of attention with `heads` = B * H heads of `dim` over any number of tokens.

    Moves are those of a call of its own; tokens that are ordered once for a model save them.
    """
    router = find_router(options.router)
    step = cost.Step(
        density=options.effective_density or cost.EXPECTED_DENSITY,
        least_keys=_LEAST_KEYS,
        pairs=router.count_pairs(cost.TOKENS),
        search_operators=router.launches,
        operators=_STEP_OPERATORS,
        steps=options.effective_refresh_every,
        moved=_MOVED,
    )
    return cost.predict(heads, dim, itemsize, step, cost.find_device(_name_device(device)))


def _name_device(device: torch.device) -> str:
    """A GPU's own name where there is one to ask, its type else."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return device.type
