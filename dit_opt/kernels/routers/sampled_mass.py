"""The softmax mass of sampled query rows, summed over blocks of any order of the keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_opt.kernels.native.sampled_mass import can_sample, sample_mass
from dit_opt.kernels.routers.orders import invert_order
from dit_opt.kernels.scores import LOG2_E, SCORE_BOUND, bound_scores

# Scores held at once. On a CPU they should stay in the cache between matmul, softmax and sums.
_CPU_SCORE_BYTES = 1 << 22
_DEVICE_SCORE_BYTES = 1 << 28

# To look at the length of every key costs what a softmax of so many rows does.
_MANY_ROWS = 100


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums of some values: `gather` int64 names what goes into each of them, one sum after the
    other, and `offsets` int64 where each begins.
    """

    gather: Tensor
    offsets: Tensor


@dataclass(frozen=True, eq=False)
class RowMeans:
    """Means over sampled rows, one for each query block of each order.

    `rows` int64 [O, m]: the sampled queries as they come in each order. `first` and `last` int32
    [O, nq]: which of these a block is the mean of, without the last.
    """

    rows: Tensor
    first: Tensor
    last: Tensor

    def to(self, device: torch.device) -> RowMeans:
        """The same on a device."""
        return RowMeans(*(x.to(device) for x in (self.rows, self.first, self.last)))


@dataclass(frozen=True)
class Part:
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
    """How N values on a device are summed over the blocks of every order, int64 [O, N] on the CPU;
    block j of order o is sum o * nk + j.

    Tokens that share their block in all orders are summed first and once for all, where that reads
    less than each block on its own would; the second sums are then over those.
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
    """Where the entries of each owner begin, once sorted by owner."""
    counts = owners.bincount()
    return counts.cumsum(0) - counts


def measure_sampled_mass(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    sums: tuple[Sums, ...],
    scale: float,
    key_bias: Tensor | None = None,
) -> Iterator[Part]:
    """The mass of each of `rows` [m] in each block of keys, a few rows or heads at a time.

    By a float32 softmax over all keys, of scores in the dtype of the keys; a row without any key
    has none. `sums` are those of `lay_sums`: each is of the sums before it, the first of tokens.
    q [B, H, N, D] and k [B, Hk, N, D] may have any strides, Hk divides H; key_bias is additive,
    [B or 1, H or 1, N].
    """
    batch, heads, _, dim = q.shape
    key_heads, tokens = k.shape[1:3]
    count, shared = rows.numel(), heads // key_heads
    # Half-precision products run in their own dtype: converting all keys would cost more than they
    # do. Processors have no fast float16.
    exact = torch.float32 if q.device.type == "cpu" and k.dtype == torch.float16 else k.dtype
    queries = q.index_select(2, rows).float() * scale
    if key_bias is None and can_sample(k):
        laid = (queries * LOG2_E).view(batch, key_heads, shared * count, dim).mT
        mass = sample_mass(laid, k, sums).unflatten(-1, (shared, count))
        whole = (slice(0, key_heads), slice(0, shared), slice(0, count))
        yield from (Part(item, *whole, mass[item]) for item in range(batch))
        return
    way = _choose_softmax(queries, k, key_bias)
    queries = (queries * LOG2_E if way == "exp2" else queries).to(exact)
    # Query heads that share a key head stand side by side, as columns of one matmul. Contiguous
    # factors, or the products run one by one, each on a copy.
    queries = queries.view(batch, key_heads, shared, count, dim).permute(0, 1, 4, 2, 3).contiguous()
    bare = None
    if key_bias is not None:
        # [B, Hk, 1, H / Hk, 1]: a softmax over no key is not a number
        bare = (key_bias == -torch.inf).all(-1).expand(batch, heads)
        bare = bare.unflatten(1, (key_heads, 1, -1)).unsqueeze(-1)
        key_bias = key_bias.float().expand(batch, heads, tokens).unflatten(1, (key_heads, -1))

    limit = _CPU_SCORE_BYTES if q.device.type == "cpu" else _DEVICE_SCORE_BYTES
    columns = max(1, limit // (4 * tokens))
    groups, chunks = [slice(0, shared)], [slice(0, count)]
    if shared * count > columns:
        groups = [slice(g, g + 1) for g in range(shared)]
        chunks = [slice(r, min(r + columns, count)) for r in range(0, count, columns)]
    step = max(1, columns // (shared * count))
    # One buffer for all parts: fresh memory costs a page fault for every 4 KiB.
    size = min(step, key_heads) * tokens * min(columns, shared * count)
    buffer = q.new_empty(size, dtype=torch.float32)
    # Each token stands in the first sums as often.
    times = sums[0].gather.numel() // tokens
    levels, length = [], tokens
    for level in sums:
        levels.append(_repeat(level, length, min(step, key_heads)))
        length = level.offsets.numel()
    for item in range(batch):
        for first in range(0, key_heads, step):
            part = slice(first, min(first + step, key_heads))
            keys = k[item, part].to(exact)
            for group in groups:
                for chunk in chunks:
                    chosen = queries[item, part, :, group, chunk]
                    scores = buffer[: len(keys) * tokens * chosen[0, 0].numel()]
                    scores = scores.view(len(keys), tokens, -1)
                    if exact == torch.float32:
                        torch.bmm(keys, chosen.flatten(2), out=scores)
                    else:
                        scores.copy_(torch.bmm(keys, chosen.flatten(2)))
                    if key_bias is not None:
                        bias = key_bias[item, part, group].transpose(1, 2).unsqueeze(-1)
                        scores.unflatten(2, (bias.shape[2], -1)).add_(bias)
                    if way == "softmax":
                        torch.softmax(scores, 1, out=scores)
                    elif way == "exp2":
                        scores.exp2_()
                    else:
                        scores.sub_(scores.amax(1, keepdim=True)).exp_()
                    found = mass = _sum(scores, levels[0])
                    for level in levels[1:]:
                        mass = _sum(mass, level)
                    if way != "softmax":
                        mass = mass * (times / found.sum(1, keepdim=True))
                    mass = mass.unflatten(2, chosen.shape[2:])
                    if bare is not None:
                        mass = mass.masked_fill(bare[item, part, :, group], 0.0)
                    yield Part(item, part, group, chunk, mass)


def _choose_softmax(
    queries: Tensor, k: Tensor, key_bias: Tensor | None
) -> Literal["softmax", "exp2", "shift"]:
    """How weights are made of scores: by torch's softmax, or not divided by their sums, of which
    there are fewer; "exp2" takes scores as they are, "shift" less the greatest of each row."""
    if queries.device.type != "cpu":
        # torch's softmax over columns gives all keys of a few rows to a single block of threads
        return "shift"
    many = queries.shape[:3].numel() >= _MANY_ROWS
    bounded = key_bias is None and many and bound_scores(queries, k, 1.0) <= SCORE_BOUND
    return "exp2" if bounded else "softmax"


def _repeat(sums: Sums, length: int, count: int) -> Sums:
    """The same sums of each of `count` matrices of `length` values, which follow each other."""
    number = torch.arange(count, device=sums.gather.device)[:, None]
    return Sums(sums.gather + number * length, sums.offsets + number * sums.gather.numel())


def _sum(values: Tensor, sums: Sums) -> Tensor:
    """Sums [n, sums, columns] of values [n, N, columns], by `_repeat` for n matrices or more."""
    count = values.shape[0]
    gather, offsets = sums.gather[:count].flatten(), sums.offsets[:count].flatten()
    # An embedding bag gathers and sums in one pass, without the permuted copy.
    return torch.embedding_bag(values.flatten(0, 1), gather, offsets)[0].unflatten(0, (count, -1))
