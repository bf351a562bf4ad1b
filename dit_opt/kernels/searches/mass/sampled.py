"""The softmax mass of sampled query rows, summed over blocks of any order of the keys."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dit_opt.kernels.plan.orders import invert_order
from dit_opt.kernels.scores import LOG2_E, SCORE_BOUND, bound_scores
from dit_opt.kernels.searches.mass.impl.cpp.sampled import can_sample, sample_mass

# Scores held at once. On a CPU they should stay in the cache between matmul, softmax and sums.
_CPU_SCORE_BYTES = 1 << 22
_DEVICE_SCORE_BYTES = 1 << 28

# Bounding the scores reads all keys, which costs as much as a softmax of so many rows.
_MANY_ROWS = 100

# Sampled rows are spaced by it: its multiples modulo 1 fill the unit interval evenly, without any
# period.
GOLDEN_RATIO = (5**0.5 - 1) / 2

Softmax = Literal["torch", "exp2", "shift"]


class Sums(NamedTuple):
    """Which values are summed, as an embedding bag takes it: `gather` int64 lists the values of one
    sum after the other, `offsets` int64 where each sum begins.
    """

    gather: Tensor
    offsets: Tensor


@dataclass(frozen=True, eq=False)
class RowMeans:
    """Which sampled rows each query block of each order is the mean of.

    `rows` int64 [O, m]: the sampled queries, sorted by each order. `first` and `last` int32
    [O, nq]: the range of `rows` that belongs to a block, `last` excluded.
    """

    rows: Tensor
    first: Tensor
    last: Tensor

    def to(self, device: torch.device) -> RowMeans:
        """The same on a device."""
        return RowMeans(*(x.to(device) for x in (self.rows, self.first, self.last)))


@dataclass(frozen=True)
class MassPart:
    """The mass of some rows of some heads.

    `item` of the batch; `keys`, `group` and `rows`: slices of the key heads, of the query heads of
    each, and of the sampled rows. `mass` float32 [keys, blocks, group, rows].
    """

    item: int
    keys: slice
    group: slice
    rows: slice
    mass: Tensor


def lay_sums(orders: Tensor, block: int, device: torch.device) -> tuple[Sums, ...]:
    """How N values are summed over the blocks of every order (`orders` int64 [O, N] on the CPU);
    block j of order o is sum o * nk + j. The result is on `device`.

    Two levels where they read less than one: tokens that share their block in all orders are summed
    once, and blocks are then sums of these.
    """
    kinds, tokens = orders.shape
    starts = torch.arange(0, tokens, block)
    number = torch.arange(kinds)[:, None]
    levels = [(orders.flatten(), (starts + number * tokens).flatten())]
    shared, cell = (invert_order(orders) // block).unique(dim=1, return_inverse=True)
    cells = shared.shape[1]
    if tokens + kinds * cells < kinds * tokens:
        names = (shared + number * len(starts)).flatten()
        levels = [
            (cell.argsort(stable=True), _find_starts(cell)),
            (names.argsort(stable=True) % cells, _find_starts(names)),
        ]
    return tuple(Sums(gather.to(device), offsets.to(device)) for gather, offsets in levels)


def _find_starts(owners: Tensor) -> Tensor:
    """Where the entries of each owner begin when they are sorted by owner."""
    counts = owners.bincount()
    return counts.cumsum(0) - counts


def measure_sampled_mass(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    sums: tuple[Sums, ...],
    scale: float,
    key_bias: Tensor | None = None,
) -> Iterator[MassPart]:
    """The mass of each of `rows` [m] in each block of keys, a few rows or heads at a time.

    By a float32 softmax over all keys, of scores in the dtype of the keys; a row without any key
    has no mass. `sums` are those of `lay_sums`: each level sums what the level before it gave, the
    first one tokens. q [B, H, N, D] and k [B, Hk, N, D] may have any strides, Hk divides H;
    key_bias is additive, [B or 1, H or 1, N].
    """
    batch, heads, _, dim = q.shape
    key_heads = k.shape[1]
    count, shared = rows.numel(), heads // key_heads
    queries = q.index_select(2, rows).float() * scale
    if key_bias is None and can_sample(k):
        laid = (queries * LOG2_E).view(batch, key_heads, shared * count, dim).mT
        mass = sample_mass(laid, k, sums).unflatten(-1, (shared, count))
        whole = (slice(0, key_heads), slice(0, shared), slice(0, count))
        yield from (MassPart(item, *whole, mass[item]) for item in range(batch))
        return
    softmax = _choose_softmax(queries, k, key_bias)
    # Half-precision products run in their own dtype, since converting all keys would cost more than
    # the products do; but CPUs have no fast float16.
    dtype = torch.float32 if q.device.type == "cpu" and k.dtype == torch.float16 else k.dtype
    queries = (queries * LOG2_E if softmax == "exp2" else queries).to(dtype)
    # Query heads that share a key head are columns of one product. Its factors are contiguous, or
    # the batched product would run one by one, each on a copy.
    queries = queries.view(batch, key_heads, shared, count, dim).permute(0, 1, 4, 2, 3).contiguous()
    yield from _measure_by_torch(queries, k, sums, key_bias, softmax)


def _measure_by_torch(
    queries: Tensor, k: Tensor, sums: tuple[Sums, ...], key_bias: Tensor | None, softmax: Softmax
) -> Iterator[MassPart]:
    """As `measure_sampled_mass`, for scaled queries [B, Hk, D, H / Hk, m] in the dtype of the
    products."""
    batch, key_heads, _, shared, count = queries.shape
    tokens = k.shape[2]
    bare = None
    if key_bias is not None:
        # [B, Hk, 1, H / Hk, 1]: rows without any key, whose softmax is NaN
        bare = (key_bias == -torch.inf).all(-1).expand(batch, key_heads * shared)
        bare = bare.unflatten(1, (key_heads, 1, -1)).unsqueeze(-1)
        key_bias = key_bias.float().expand(batch, key_heads * shared, tokens)
        key_bias = key_bias.unflatten(1, (key_heads, -1))
    limit = _CPU_SCORE_BYTES if k.device.type == "cpu" else _DEVICE_SCORE_BYTES
    columns = max(1, limit // (4 * tokens))
    groups, chunks = [slice(0, shared)], [slice(0, count)]
    if shared * count > columns:
        groups = [slice(g, g + 1) for g in range(shared)]
        chunks = [slice(r, min(r + columns, count)) for r in range(0, count, columns)]
    step = min(max(1, columns // (shared * count)), key_heads)
    # One buffer for all parts: fresh memory costs a page fault for every 4 KiB.
    size = step * tokens * min(columns, shared * count)
    buffer = k.new_empty(size, dtype=torch.float32)
    levels, length = [], tokens
    for level in sums:
        levels.append(_repeat(level, length, step))
        length = level.offsets.numel()
    # How often the first level counts each token.
    times = sums[0].gather.numel() // tokens
    for item, first in itertools.product(range(batch), range(0, key_heads, step)):
        part = slice(first, min(first + step, key_heads))
        keys = k[item, part].to(queries.dtype)
        for group, chunk in itertools.product(groups, chunks):
            chosen = queries[item, part, :, group, chunk]
            bias = None if key_bias is None else key_bias[item, part, group]
            found = mass = _sum(_weigh(keys, chosen, bias, softmax, buffer), levels[0])
            for level in levels[1:]:
                mass = _sum(mass, level)
            if softmax != "torch":
                mass = mass * (times / found.sum(1, keepdim=True))
            mass = mass.unflatten(2, chosen.shape[2:])
            if bare is not None:
                mass = mass.masked_fill(bare[item, part, :, group], 0.0)
            yield MassPart(item, part, group, chunk, mass)


def _weigh(
    keys: Tensor, queries: Tensor, bias: Tensor | None, softmax: Softmax, buffer: Tensor
) -> Tensor:
    """The softmax weights, in the buffer, of keys [n, N, D] for queries [n, D, group, m], without
    the division by their sums but by "torch": float32 [n, N, group * m]."""
    count, tokens, _ = keys.shape
    scores = buffer[: count * tokens * queries[0, 0].numel()].view(count, tokens, -1)
    if keys.dtype == torch.float32:
        torch.bmm(keys, queries.flatten(2), out=scores)
    else:
        scores.copy_(torch.bmm(keys, queries.flatten(2)))
    if bias is not None:
        bias = bias.transpose(1, 2).unsqueeze(-1)
        scores.unflatten(2, (bias.shape[2], -1)).add_(bias)
    if softmax == "torch":
        torch.softmax(scores, 1, out=scores)
    elif softmax == "exp2":
        scores.exp2_()
    else:
        scores.sub_(scores.amax(1, keepdim=True)).exp_()
    return scores


def _choose_softmax(queries: Tensor, k: Tensor, key_bias: Tensor | None) -> Softmax:
    """How weights are computed from scores. "exp2" and "shift" leave the division to the sums over
    blocks, of which there are fewer; "exp2" needs scores that are bounded, in units of log2."""
    if queries.device.type != "cpu":
        # torch's softmax over columns gives all keys of a few rows to one block of threads
        return "shift"
    many = queries.shape[:3].numel() >= _MANY_ROWS
    bounded = key_bias is None and many and bound_scores(queries, k, 1.0) <= SCORE_BOUND
    return "exp2" if bounded else "torch"


def _repeat(sums: Sums, length: int, count: int) -> Sums:
    """The same sums for each of `count` consecutive matrices of `length` values."""
    number = torch.arange(count, device=sums.gather.device)[:, None]
    return Sums(sums.gather + number * length, sums.offsets + number * sums.gather.numel())


def _sum(values: Tensor, sums: Sums) -> Tensor:
    """Sums [n, sums, columns] of values [n, N, columns]; `sums` are repeated for n or more."""
    count = values.shape[0]
    gather, offsets = sums.gather[:count].flatten(), sums.offsets[:count].flatten()
    # An embedding bag gathers and sums in one pass, without the permuted copy.
    return torch.embedding_bag(values.flatten(0, 1), gather, offsets)[0].unflatten(0, (count, -1))
