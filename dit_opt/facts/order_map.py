"""What each node needs of the order of the video tokens: nothing, or the order of the model.

A permutation of the tokens is a layout. Wherever a tensor holds the axes of the tokens as one run,
it may be kept in another order; wherever they stand apart, it is as the model made it. A node that
acts alike at every token runs on either; any other needs the order undone on what it reads. A wrong
label can therefore cost a permutation, and only a wrong rule could cost a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, unique
from typing import Any

import torch
from torch.fx import Graph, Node

from dit_opt.facts.axes import Dim
from dit_opt.facts.labels import Labels
from dit_opt.facts.nodes import op_name
from dit_opt.facts.token_axes import TokenAxes

__all__ = ["OrderMap", "OrderReason"]


@unique
class OrderReason(Enum):
    """Why tokens cannot be kept in another order, as a sentence."""

    NO_TOKENS = "No attention site has queries that are proved to be latent tokens."
    NO_GRID = "The graph does not tell the grid of the latent tokens."
    SEVERAL_TOKENS = "Attention sites range over different latent tokens."
    STACKED = "The latents come in several tensors, joined for the attention."
    UNKNOWN_OP = "No rule tells what it does to tokens."
    CAUSAL = "It is causal: which keys a query sees depends on their order."
    CONVOLUTION = "It convolves over tokens, so neighbours matter."
    REGROUPS = "It takes the tokens apart or joins them anew, as a view back to the grid does."
    POSITIONS = "It reads or writes tokens by position."
    CLASHES = "What it combines is laid out over the tokens in different ways."
    RANDOM = "It draws random numbers token by token."
    VALUES = "It hands values of tokens out of the graph."
    IN_PLACE = "It writes in place what is read both in the order and in the model's own."
    PAIRWISE = "It is a table over pairs of tokens: ordering it costs the square of their number."
    FOLDED = "The tokens share a dimension with other axes where they enter or leave the order."
    # Not obstacles: where the order begins and ends.
    BEGINS = "The tokens become one dimension here."
    LEAVES = "It is returned by the graph."


# How these look at a tensor tells nothing of its values.
_SHAPE_READS = set(
    "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex "
    "element_size get_device sym_size sym_stride sym_numel len".split()
)
_SHAPE_ATTRIBUTES = set("shape dtype device ndim itemsize is_cuda layout requires_grad".split())
# The same value everywhere, or none yet.
_CONSTANTS = set(
    "zeros ones full empty new_zeros new_ones new_full new_empty zeros_like ones_like full_like "
    "empty_like scalar_tensor".split()
)
# What they repeat is alike along the new axis.
_REPEATS = set("expand expand_as broadcast_to repeat tile repeat_interleave".split())
_PARTS = set("getitem split chunk split_with_sizes tensor_split narrow".split())
_SUMS = set(
    "mean sum var std amax amin max min any all prod logsumexp norm vector_norm "
    "linalg_vector_norm linear matmul __matmul__ bmm mm baddbmm addmm einsum "
    "scaled_dot_product_attention".split()
)
_POSITIONAL = _PARTS | set("setitem select unbind index_select embedding group_norm".split())
# Of their second argument only the shape or the dtype counts.
_LIKENESSES = set("to type_as expand_as".split())
_RESHAPES = set("reshape view flatten unflatten ravel squeeze view_as_complex".split())
_INPUTS = ("placeholder", "get_attr")


class OrderMap:
    """Which nodes need tokens in the model's own order.

    Args:
        graph: a pre-grad graph with fake tensors in `meta["example_value"]`; it is read only.
        labels: of the same graph.
        run: the axes of the video tokens.

    Attributes:
        plain: why, for each node that needs what it reads, and makes what it returns, in the
            model's own order. All others act alike at every token.
    """

    def __init__(self, graph: Graph, labels: Labels, run: TokenAxes) -> None:
        self.labels = labels
        self.tokens = run
        self.nodes = tuple(graph.nodes)
        self._held = {n: max(map(self._count, self._parts(n)), default=0) for n in self.nodes}
        self.pinned: dict[Node, OrderReason] = {}
        for node in self.nodes:
            reason = self._classify(node)
            if reason is not None:
                self.pinned[node] = reason

    def holds(self, node: Node) -> bool:
        """Whether a value has the whole run in one of its dimensions."""
        return self._held.get(node, 0) > 0

    def is_entry(self, node: Node) -> bool:
        """Whether the order begins at a value: a plain node makes it."""
        return node in self.pinned and self.holds(node)

    def is_ordered(self, node: Node) -> bool:
        """Whether a value stands in the order from the start."""
        return self.holds(node) and node not in self.pinned

    def undone_inputs(self, node: Node) -> list[Node]:
        """The ordered values that a plain node reads; empty for any other node."""
        return (
            [a for a in node.all_input_nodes if self.is_ordered(a)] if node in self.pinned else []
        )

    def find_crossing(self) -> Node | None:
        """The first node that takes tokens out of the order only for them to enter it again.

        Walking stops at the next node that takes tokens out: it answers for what follows it.
        """
        for node in self.nodes:
            if not self.undone_inputs(node):
                continue
            todo, seen = [node], set()
            while todo:
                current = todo.pop()
                if self.is_entry(current):
                    return node
                if current not in seen and (current is node or not self.undone_inputs(current)):
                    todo += current.users
                seen.add(current)
        return None

    def _parts(self, node: Node) -> list[list[Dim]]:
        label = self.labels.label_of(node)
        if isinstance(label, tuple):
            return [part for part in label if isinstance(part, list)]
        return [] if label is None else [label]

    def _count(self, dims: list[Dim]) -> int:
        return sum(map(self.tokens.count, dims))

    def _classify(self, node: Node) -> OrderReason | None:
        """Why a node is plain, or None."""
        holds, name = self.holds(node), op_name(node)
        sources = node.args[:1] if name in _LIKENESSES else node.all_input_nodes
        reads = [a for a in sources if isinstance(a, Node) and self.holds(a)]
        if node.op == "output":
            return OrderReason.LEAVES if reads else None
        if node.op in _INPUTS:
            return OrderReason.BEGINS if holds else None
        if not reads and not holds:
            return None
        part_of = node.args[0] if name == "getitem" else None
        if isinstance(part_of, Node) and isinstance(self.labels.label_of(part_of), tuple):
            return self.pinned.get(part_of) if holds else None
        if self.labels.label_of(node) is None and name != "setitem":
            return None if _reads_shape(node, name) else OrderReason.VALUES
        if node in self.labels.unknown or any(map(_is_unseen, sources)):
            return OrderReason.UNKNOWN_OP
        if name in _CONSTANTS:
            return None
        if _is_random(node, name):
            return OrderReason.RANDOM
        if any(map(self.tokens.touches, self.labels.ends.get(node, ()))):
            return _why_ended(node, name)
        made = name not in _REPEATS and any(
            map(self.tokens.touches, self.labels.makes.get(node, ()))
        )
        if any(map(self.tokens.is_torn, self._around(node))):
            return _why_torn(name) if reads else OrderReason.BEGINS
        if holds and not reads:
            return None if name in _REPEATS else OrderReason.BEGINS
        if made:
            return OrderReason.POSITIONS
        lost = max(self._held[a] for a in reads) > self._held[node]
        if lost and name not in _PARTS | _SUMS | {"setitem"}:
            return _why_torn(name)
        return None

    def _around(self, node: Node) -> Iterator[Dim]:
        for neighbour in (node, *node.all_input_nodes):
            yield from self.labels.dims_of(neighbour)


def _why_ended(node: Node, name: str) -> OrderReason:
    if name == "scaled_dot_product_attention":
        causal = _argument(node, 5, "is_causal", False)
        return OrderReason.CAUSAL if causal is not False else OrderReason.CLASHES
    if name in _POSITIONAL:
        return OrderReason.POSITIONS
    known = name.startswith("conv") or name in _RESHAPES
    return _why_torn(name) if known else OrderReason.CLASHES


def _why_torn(name: str) -> OrderReason:
    if name.startswith("conv"):
        return OrderReason.CONVOLUTION
    return OrderReason.REGROUPS if name in _RESHAPES else OrderReason.POSITIONS


def _is_unseen(source: Any) -> bool:
    """Whether a value has no fake tensor or number that would tell what it is."""
    return isinstance(source, Node) and "example_value" not in source.meta


def _reads_shape(node: Node, name: str) -> bool:
    return name in _SHAPE_READS or (name == "getattr" and node.args[1] in _SHAPE_ATTRIBUTES)


def _is_random(node: Node, name: str) -> bool:
    if name == "dropout":
        training = _argument(node, 2, "training", _argument(node, 2, "train", True))
        return training is not False and _argument(node, 1, "p", 0.5) != 0
    if name == "scaled_dot_product_attention":
        return _argument(node, 4, "dropout_p", 0.0) != 0
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(
        torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags
        for overload in packet.overloads()
    )


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)
