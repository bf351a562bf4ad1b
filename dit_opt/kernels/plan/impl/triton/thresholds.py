"""Thresholds on GPUs: one launch for each bit, where PyTorch needs seven.

Each launch sums the gains above the next candidate in parts. Every program adds up the parts of the
launch before to know whether that candidate held, so no launch of its own has to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.launch import Launch

# Parts of a sum, and values that a program adds at a time.
PARTS, CHUNK = 1024, 1024


# Sizes that are not specialised: another length must not compile it again.
@triton.jit(do_not_specialize=["size", "span", "period", "parts", "step"])
def sum_above_kernel(
    p_scores, p_gains, p_target, p_low, p_next, p_parts, p_sums,
    size, span, period, parts, step,
    IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr, WITHIN: tl.constexpr, REPEATS: tl.constexpr,
    PARTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One part (grid axis 1) of the sum of one group (axis 0), `span` of its `size` values.

    `p_low` and `p_parts` are of the launch before, whose bit was step + 1; `p_next` and `p_sums`
    of this one. Gains that repeat do so after `period` values, and are the same in all groups.
    """
    group = tl.program_id(0)
    part = tl.program_id(1)
    low = tl.load(p_low + group)
    if not IS_FIRST:
        o_p = tl.arange(0, PARTS)
        total = tl.sum(tl.load(p_parts + group * parts + o_p, mask=o_p < parts, other=0.0), 0)
        target = tl.load(p_target + group)
        holds = total > target if WITHIN else total >= target
        low = tl.where(holds, low + (1 << (step + 1)), low)
    if part == 0:
        tl.store(p_next + group, low)
    if not IS_LAST:
        threshold = (low + (1 << step)).to(tl.float32, bitcast=True)
        start = group.to(tl.int64) * size
        stop = tl.minimum((part + 1) * span, size)
        b_sum = tl.zeros([CHUNK], tl.float32)
        for first in tl.range(part * span, stop, CHUNK):
            o_s = first + tl.arange(0, CHUNK)
            b_score = tl.load(p_scores + start + o_s, mask=o_s < stop, other=0.0)
            o_g = o_s % period if REPEATS else start + o_s
            b_gain = tl.load(p_gains + o_g, mask=o_s < stop, other=0.0)
            b_sum += tl.where(b_score >= threshold, b_gain, 0.0)
        tl.store(p_sums + group * parts + part, tl.sum(b_sum, 0))


def search_bits(
    scores: Tensor, gains: Tensor, target: Tensor, lowest: int, steps: int, within: bool
) -> Tensor:
    """The bits of the last threshold that holds, int32 [G]: `lowest` plus a number of `steps` bits.

    Args:
        scores: float32 [G, M].
        gains: float32, as many, or a divisor of M; these repeat.
        target: float32 [G].
    """
    groups, size = scores.shape
    parts = min(PARTS, ceil_div(size, CHUNK))
    low = torch.full((2, groups), lowest, dtype=torch.int32, device=scores.device)
    sums = scores.new_empty((2, groups, parts))
    (low, last), (sums, next_sums) = low.unbind(), sums.unbind()
    for step in reversed(range(-1, steps)):
        buffers = (low, last, sums, next_sums)
        launch_step(scores, gains, target, *buffers, step, steps, within).run()
        low, last, sums, next_sums = last, low, next_sums, sums
    return low


def launch_step(
    scores: Tensor,
    gains: Tensor,
    target: Tensor,
    low: Tensor,
    next_low: Tensor,
    sums: Tensor,
    next_sums: Tensor,
    step: int,
    steps: int,
    within: bool,
) -> Launch:
    """`sum_above_kernel` for one bit: bounds int32 [G] and sums float32 [G, parts] of the launch
    before, and where to write the next ones."""
    (groups, size), parts = scores.shape, sums.shape[1]
    args = {
        "p_scores": scores,
        "p_gains": gains,
        "p_target": target,
        "p_low": low,
        "p_next": next_low,
        "p_parts": sums,
        "p_sums": next_sums,
        "size": size,
        "span": ceil_div(ceil_div(size, parts), CHUNK) * CHUNK,
        "period": gains.numel(),
        "parts": parts,
        "step": step,
    }
    constexprs = {
        "IS_FIRST": step == steps - 1,
        "IS_LAST": step < 0,
        "WITHIN": within,
        "REPEATS": gains.numel() < scores.numel(),
        "PARTS": PARTS,
        "CHUNK": CHUNK,
    }
    # Groups are the first axis: there may be more than the second axis of a grid takes.
    return Launch(sum_above_kernel, (groups, parts), args, constexprs)
