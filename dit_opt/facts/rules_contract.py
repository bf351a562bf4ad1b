"""Rules for ops that sum over axes: products of matrices, attention, convolutions, lookups.

Contracted axes are one index space, the others pass; a convolution that cuts patches says where the
grid comes from.
"""

from __future__ import annotations

from typing import Any

import sympy
from torch.fx import Node

from dit_opt.facts.axes import Dim, resolve, size, unify
from dit_opt.facts.labels import Labels, NoRule, Rule
from dit_opt.facts.sizes import are_equal


def linear(labels: Labels, x: Node, weight: Node, bias: Any = None) -> list[Dim]:
    labels.tie(labels[x][-1], labels[weight][1])
    if labels.is_tensor(bias):
        labels.tie(labels[bias][0], labels[weight][0])
    return [*labels[x][:-1], labels[weight][0]]


def matmul(labels: Labels, x: Node, y: Node) -> list[Dim]:
    a, b = labels[x], labels[y]
    if len(b) == 1:
        labels.tie(a[-1], b[-1])
        return a[:-1]
    labels.tie(a[-1], b[-2])
    if len(a) == 1:
        return [*b[:-2], b[-1]]
    lead = [
        labels.agree(*(label[d] for label in (a, b) if len(label) >= -d))
        for d in range(-max(len(a), len(b)), -2)
    ]
    return [*lead, a[-2], b[-1]]


def batched(labels: Labels, input: Node, mat2: Node) -> list[Dim]:
    """`bmm`, `mm`."""
    return matmul(labels, input, mat2)


def matmul_add(
    labels: Labels, input: Node, batch1: Node, batch2: Node, *, beta: Any = 1, alpha: Any = 1
) -> list[Dim]:
    """`baddbmm`, `addmm`; with beta 0 the first operand is not read."""
    out = matmul(labels, batch1, batch2)
    if beta != 0:
        for dim, other in zip(reversed(out), reversed(labels[input]), strict=False):
            if size(other) != 1:
                labels.agree(dim, other)
    return out


def einsum(labels: Labels, equation: str, *operands: Any) -> list[Dim]:
    if "..." in equation or "->" not in equation:
        raise NoRule(f"einsum {equation}")
    left, right = equation.replace(" ", "").split("->")
    inputs = operands if isinstance(operands[0], Node) else operands[0]
    at: dict[str, Dim] = {}
    for operand, word in zip(inputs, left.split(","), strict=True):
        if len(set(word)) < len(word):
            raise NoRule("einsum over a diagonal")
        for letter, dim in zip(word, labels[operand], strict=True):
            at[letter] = labels.agree(at.get(letter, ()), dim)
    return [at[letter] for letter in right]


def outer(labels: Labels, x: Node, y: Node) -> list[Dim]:
    return [labels[x][0], labels[y][0]]


def embedding(labels: Labels, input: Node, weight: Node, *_: Any, **__: Any) -> list[Dim]:
    labels.end(labels[weight][0])
    return [*labels[input], labels[weight][1]]


def attention(
    labels: Labels,
    query: Node,
    key: Node,
    value: Node,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> list[Dim]:
    """Keys and values share tokens, a mask is over both sides, a causal site reads positions."""
    q, k, v = labels[query], labels[key], labels[value]
    labels.tie(k[-2], v[-2])
    labels.tie(q[-1], k[-1])
    for d in range(len(q) - 2):
        for other in (k[d], v[d]):
            # Grouped heads differ in size.
            if are_equal(size(other), size(q[d])):
                labels.tie(q[d], other)
            else:
                labels.end(q[d])
                labels.end(other)
    if labels.is_tensor(attn_mask):
        mask = labels[attn_mask]
        for d, dim in enumerate(reversed(mask)):
            if size(dim) != 1:
                labels.tie(dim, k[-2] if d == 0 else q[-1 - d])
    if not is_causal:
        return [*q[:-1], v[-1]]
    for dim in (q[-2], k[-2]):
        labels.end(dim)
    return [*q[:-2], labels.new("causal", size(q[-2])), v[-1]]


def convolution(
    labels: Labels,
    input: Node,
    weight: Node,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> list[Dim]:
    x, w, want = labels[input], labels[weight], labels.sizes()
    n = len(w) - 2
    step, edge, gap = (_each(v, n) for v in (stride, padding, dilation))
    if are_equal(size(x[-n - 1]), size(w[1])):
        labels.tie(x[-n - 1], w[1])
    else:
        # With groups, the index of a channel decides which weights it meets.
        for channels in (x[-n - 1], w[0], w[1]):
            labels.end(channels)
    if labels.is_tensor(bias):
        labels.tie(labels[bias][0], w[0])
    dims = [
        _patch(labels, dim, w[2 + i], step[i], edge[i], gap[i], want[i - n], i)
        for i, dim in enumerate(x[-n:])
    ]
    return [*x[: -n - 1], w[0], *dims]


def _each(value: Any, n: int) -> list[Any]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * n if len(values) == 1 else values


def _patch(
    labels: Labels, dim: Dim, kernel: Dim, stride: Any, padding: Any, dilation: Any,
    length: sympy.Expr, slot: int,
) -> Dim:  # fmt: skip
    """One dimension of a convolution: passed on, cut into patches, or ended by mixing."""
    padding = 0 if padding == "valid" else padding
    extent = size(kernel)
    if padding == 0 and extent == stride == 1:
        return dim
    patches = padding == 0 and dilation == 1 and extent == stride
    whole = resolve(dim)
    origins = whole[0].origins if patches and len(whole) == 1 else ()
    outer = labels.new(("convolution", slot), length, origins)
    # Where the sizes do not prove that patches cover the dimension, a rest may be cut off.
    covered = patches and are_equal(length * extent, size(dim))
    if not (covered and unify(dim, outer + kernel)):
        labels.end(dim)
        labels.end(kernel)
    return outer


CONTRACT_RULES: dict[str, Rule] = {
    "linear": linear,
    "matmul": matmul,
    **dict.fromkeys("bmm mm".split(), batched),
    **dict.fromkeys("baddbmm addmm".split(), matmul_add),
    "einsum": einsum,
    "outer": outer,
    "embedding": embedding,
    "scaled_dot_product_attention": attention,
    **dict.fromkeys("conv1d conv2d conv3d".split(), convolution),
}
