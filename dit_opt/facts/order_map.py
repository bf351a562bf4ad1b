"""Which nodes work in any order of the video tokens, and which need the model's own.

A permutation of the tokens is a layout. A tensor that holds all token axes contiguously may be kept
permuted; one in which they are apart stays as the model made it. A node that treats all tokens
alike runs on either; for any other, the permutation is undone on its inputs. A wrong label can
therefore cost a permutation; only a wrong rule could cost correctness.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, unique
from typing import Any

from torch.fx import Graph, Node

from dit_opt.facts.axes import Dim
from dit_opt.facts.labels import Labels
from dit_opt.facts.ops import Trait, argument, has, is_op, is_random, reads_shape
from dit_opt.facts.token_axes import TokenAxes


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


_INPUTS = ("placeholder", "get_attr")
# Their value may lack tokens of the input without depending on their order.
_MAY_DROP_TOKENS = Trait.SLICE | Trait.REDUCE | Trait.CONTRACT | Trait.IN_PLACE


class OrderMap:
    """Which nodes need tokens in the model's own order.

    Args:
        graph: a pre-grad graph with fake tensors in `meta["example_value"]`; it is read only.
        labels: of the same graph.
        tokens: the axes of the video tokens.

    Attributes:
        pinned: the nodes that read and return tokens in the model's own order, each with the
            reason. All others treat all tokens alike.
    """

    def __init__(self, graph: Graph, labels: Labels, tokens: TokenAxes) -> None:
        self.labels = labels
        self.tokens = tokens
        self.nodes = tuple(graph.nodes)
        self._held = {n: max(map(self._count, self._parts(n)), default=0) for n in self.nodes}
        self.pinned: dict[Node, OrderReason] = {}
        for node in self.nodes:
            reason = self._classify(node)
            if reason is not None:
                self.pinned[node] = reason

    def holds(self, node: Node) -> bool:
        """Whether a value holds all token axes in one of its dimensions."""
        return self._held.get(node, 0) > 0

    def is_entry(self, node: Node) -> bool:
        """Whether a value has to be permuted: a pinned node makes it."""
        return node in self.pinned and self.holds(node)

    def is_ordered(self, node: Node) -> bool:
        """Whether a value is permuted as its node makes it."""
        return self.holds(node) and node not in self.pinned

    def undone_inputs(self, node: Node) -> list[Node]:
        """The permuted values that a pinned node reads; empty for any other node."""
        return (
            [a for a in node.all_input_nodes if self.is_ordered(a)] if node in self.pinned else []
        )

    def find_crossing(self) -> Node | None:
        """The first node for which the order is undone and whose results are permuted again.

        The walk stops at the next node for which the order is undone: that one is asked by itself.
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
        """Why a node is pinned, or None."""
        holds = self.holds(node)
        sources = node.args[:1] if has(node, Trait.LIKENESS) else node.all_input_nodes
        reads = [a for a in sources if isinstance(a, Node) and self.holds(a)]
        if node.op == "output":
            return OrderReason.LEAVES if reads else None
        if node.op in _INPUTS:
            return OrderReason.BEGINS if holds else None
        if not reads and not holds:
            return None
        part_of = node.args[0] if is_op(node, "getitem") else None
        if isinstance(part_of, Node) and isinstance(self.labels.label_of(part_of), tuple):
            return self.pinned.get(part_of) if holds else None
        if self.labels.label_of(node) is None and not is_op(node, "setitem"):
            return None if reads_shape(node) else OrderReason.VALUES
        if node in self.labels.unknown or any(map(_is_unseen, sources)):
            return OrderReason.UNKNOWN_OP
        if has(node, Trait.UNIFORM):
            return None
        if is_random(node):
            return OrderReason.RANDOM
        if any(map(self.tokens.touches, self.labels.ends.get(node, ()))):
            return _why_ended(node)
        made = not has(node, Trait.REPEAT) and any(
            map(self.tokens.touches, self.labels.makes.get(node, ()))
        )
        if any(map(self.tokens.is_torn, self._around(node))):
            return _why_torn(node) if reads else OrderReason.BEGINS
        if holds and not reads:
            return None if has(node, Trait.REPEAT) else OrderReason.BEGINS
        if made:
            return OrderReason.POSITIONS
        lost = max(self._held[a] for a in reads) > self._held[node]
        if lost and not has(node, _MAY_DROP_TOKENS):
            return _why_torn(node)
        return None

    def _around(self, node: Node) -> Iterator[Dim]:
        for neighbour in (node, *node.all_input_nodes):
            yield from self.labels.dims_of(neighbour)


def _why_ended(node: Node) -> OrderReason:
    if is_op(node, "scaled_dot_product_attention"):
        causal = argument(node, 5, "is_causal", False)
        return OrderReason.CAUSAL if causal is not False else OrderReason.CLASHES
    if has(node, Trait.POSITIONAL):
        return OrderReason.POSITIONS
    known = has(node, Trait.CONVOLVE | Trait.RESHAPE)
    return _why_torn(node) if known else OrderReason.CLASHES


def _why_torn(node: Node) -> OrderReason:
    if has(node, Trait.CONVOLVE):
        return OrderReason.CONVOLUTION
    return OrderReason.REGROUPS if has(node, Trait.RESHAPE) else OrderReason.POSITIONS


def _is_unseen(source: Any) -> bool:
    """Whether nothing is known of a value: it has no fake tensor."""
    return isinstance(source, Node) and "example_value" not in source.meta
