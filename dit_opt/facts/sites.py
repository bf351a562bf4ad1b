"""Every attention call of a graph, in one canonical form.

Models write attention in many ways; passes and reports want one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from dit_opt._compat import kernel_selections, operator_name
from dit_opt.decisions import AttentionReason
from dit_opt.facts.decomposed import match_decomposed
from dit_opt.facts.nodes import tensor_of


class Form(Enum):
    """How a site is written."""

    SDPA = "scaled_dot_product_attention"
    DECOMPOSED = "softmax(q k^T) v"
    MULTIHEAD = "multi_head_attention_forward"
    FLEX = "flex_attention"
    FOREIGN = "custom op"


@dataclass(frozen=True)
class Site:
    """One attention call.

    Attributes:
        index: number of the site in its graph, in graph order.
        node: the node whose value is attention's output; of another graph under INSIDE_REGION.
        query, key, value: `[..., N, D]` as the call takes them; None where the form hides them.
            Those of MULTIHEAD are not projected yet.
        mask: the attention mask, boolean or additive, or None.
        scale: factor of the scores; None is the default, D ** -0.5.
        module: module that calls it, as "blocks.0.attn1"; "" at the top of the model.
        source: place of the call in the model's code, as "transformer_wan.py:214".
        interior: nodes other than `node` that the site is made of (DECOMPOSED only).
        refusal: why the call by itself cannot be replaced, whatever its tokens are; else None.
        detail: what `refusal` is about.
    """

    index: int
    node: Node
    form: Form
    query: Node | None
    key: Node | None
    value: Node | None
    mask: Node | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    enable_gqa: bool = False
    module: str = ""
    source: str = ""
    interior: tuple[Node, ...] = ()
    refusal: AttentionReason | None = None
    detail: str = ""


def find_sites(graph: Graph) -> tuple[Site, ...]:
    """All attention calls of a Dynamo graph, in graph order.

    Found are `F.scaled_dot_product_attention` and its aten operator with positional or keyword
    arguments, `softmax(q k^T * scale + mask) v` written with matmul, bmm, baddbmm or `@`,
    `F.multi_head_attention_forward`, `flex_attention`, and operators of other libraries with
    attention in their name. Those of a region's own graph (`torch.cond`, checkpointing) stand where
    the region is called, each with INSIDE_REGION.
    """
    found = sorted(_scan(graph), key=lambda pair: pair[0])
    return tuple(
        Site(index, module=module_of(fields["node"]), source=source_of(fields["node"]), **fields)
        for index, (_, fields) in enumerate(found)
    )


def module_of(node: Node) -> str:
    """Name of the innermost module that the node was traced in, relative to the compiled one."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    # "L['self'].__dict__['_modules']['blocks'].0.attn1" is "blocks.0.attn1"
    name = re.sub(r"^[LG]\['\w+'\]", "", list(stack.values())[-1][0])
    parts = re.split(r"[\[\].'\"]+", name)
    return ".".join(p for p in parts if p and p not in ("__dict__", "_modules"))


def source_of(node: Node) -> str:
    """File and line, in the model's code, of the call that led to the node.

    The innermost frame may belong to a dispatcher that serves every site, so the innermost one in
    a file that defines one of the surrounding modules is preferred.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    stack = node.meta.get("nn_module_stack") or {}
    owners = {str(getattr(kind, "__module__", kind)) for _, kind in stack.values()}
    files = tuple("/" + owner.replace(".", "/") + ".py" for owner in owners)
    own = [(path, line) for path, line in frames if path.endswith(files)]
    if not frames:
        return ""
    path, line = (own or frames)[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line}"


_SDPA_OPERATOR = "aten.scaled_dot_product_attention"
_FLEX_OPERATORS = ("higher_order.flex_attention", "higher_order.flex_attention_backward")
_ATTENTION_NAME = re.compile(r"attn|attention|flash|xformers", re.IGNORECASE)
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def _scan(graph: Graph) -> Iterator[tuple[int, dict[str, Any]]]:
    """The position and the fields of each site."""
    pinned = _find_pinned(graph)
    for position, node in enumerate(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        operator = operator_name(node.target)
        if node.target is F.scaled_dot_product_attention or operator == _SDPA_OPERATOR:
            yield position, _read_sdpa(node, pinned.get(node))
        elif node.target is F.multi_head_attention_forward:
            yield position, _read_opaque(node, Form.MULTIHEAD, AttentionReason.OPAQUE_MHA)
        elif operator in _FLEX_OPERATORS:
            yield position, _read_opaque(node, Form.FLEX, AttentionReason.FLEX)
        elif regions := _find_regions(node):
            for _, fields in (pair for region in regions for pair in _scan(region)):
                name = (operator or str(node.target)).removeprefix("higher_order.")
                yield position, {**fields, "refusal": AttentionReason.INSIDE_REGION, "detail": name}
        elif operator is not None:
            if not operator.startswith("ditopt.") and _ATTENTION_NAME.search(operator):
                yield (
                    position,
                    _read_opaque(node, Form.FOREIGN, AttentionReason.FOREIGN_OP, operator),
                )
        else:
            match = match_decomposed(node)
            if match is not None:
                # its fields are those of a site
                yield position, {**vars(match), "form": Form.DECOMPOSED}


def _find_regions(node: Node) -> list[Graph]:
    """The graphs that a higher-order operator runs: modules that it takes as arguments."""
    owner = node.graph.owning_module
    graphs = []
    for argument in node.all_input_nodes if owner is not None else ():
        if argument.op == "get_attr":
            value: Any = owner
            for name in str(argument.target).split("."):
                value = getattr(value, name, None)
            if isinstance(value, GraphModule):
                graphs.append(value.graph)
    return graphs


def _read_sdpa(node: Node, pinned: str | None) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(zip(_SDPA_ARGUMENTS, node.args, strict=False), **node.kwargs)
    scale = arguments.get("scale")
    fields: dict[str, Any] = {
        "node": node,
        "form": Form.SDPA,
        "query": arguments["query"],
        "key": arguments["key"],
        "value": arguments["value"],
        "mask": arguments.get("attn_mask"),
        "scale": None if scale is None or isinstance(scale, Node) else float(scale),
        "dropout_p": arguments.get("dropout_p", 0.0),
        "is_causal": arguments.get("is_causal", False),
        "enable_gqa": arguments.get("enable_gqa", False),
    }
    if pinned is not None:
        fields.update(refusal=AttentionReason.PINNED_BACKEND, detail=pinned)
    elif fields["is_causal"] is not False:
        fields.update(refusal=AttentionReason.CAUSAL)
    elif fields["dropout_p"] != 0.0:
        fields.update(refusal=AttentionReason.DROPOUT, detail=f"dropout_p={fields['dropout_p']}")
    elif isinstance(scale, Node):
        fields.update(refusal=AttentionReason.DYNAMIC_SCALE, detail=f"scale={scale.name}")
    return fields


def _read_opaque(
    node: Node, form: Form, reason: AttentionReason, detail: str = ""
) -> dict[str, Any]:
    names = _SDPA_ARGUMENTS[:3]
    tensors = [n for n in node.args if tensor_of(n) is not None]
    tensors += [n for n in map(node.kwargs.get, names) if isinstance(n, Node)]
    qkv = dict(zip(names, (*tensors, None, None, None), strict=False))
    return {"node": node, "form": form, **qkv, "refusal": reason, "detail": detail}


def _find_pinned(graph: Graph) -> dict[Node, str]:
    """The nodes inside an `sdpa_kernel` context, with the backends that it selects.

    Contexts are balanced in a Dynamo graph and each exit selects what was selected before, so the
    last selection of a graph is the one of the outside.
    """
    selections = kernel_selections(graph)
    if not selections:
        return {}
    outside = list(selections.values())[-1]
    current, pinned = outside, {}
    for node in graph.nodes:
        current = selections.get(node, current)
        if current != outside:
            pinned[node] = ", ".join(current)
    return pinned
