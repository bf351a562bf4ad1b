"""The only home of torch names that torch keeps private: a torch upgrade is a change of one file.

Each name says why the public API does not do, and has a contract test in tests/test_compat.py. Both
torch 2.11 and 2.13 have all of them.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch

# What Dynamo makes of an exception of a backend.
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.source import (
    ConstantSource,
    NNModuleSource,
    ParamBufferSource,
    UnspecializedNNModuleSource,
)
from torch._logging import trace_structured  # pyright: ignore[reportPrivateImportUsage] - private
from torch._logging._internal import trace_log
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

# Nothing public tells that a tensor has no values.
from torch._subclasses.fake_tensor import FakeTensor, is_fake
from torch.fx import Graph, Node

# Floor division and modulo of sizes: sympy has no exact integer forms of its own.
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

__all__ = [
    "BackendCompilerFailed",
    "FloorDiv",
    "Mod",
    "PythonMod",
    "belongs_to_model",
    "compile_with_inductor",
    "emit_artifact",
    "expand_mode",
    "forget_compiled",
    "fresh_code",
    "inductor_settings",
    "is_fake",
    "is_tracing",
    "kernel_selections",
    "mark_static_input",
    "operator_name",
    "parameter_path",
    "proved_sizes",
    "size_expression",
    "size_hint",
    "without_guards",
    "writes_in_place",
]


def size_expression(size: int | torch.SymInt) -> sympy.Expr:
    """The size as an expression over the graph's symbols; reading it adds no guard.

    `SymInt.node` is the only way to a size's expression.
    """
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(int(size))


def size_hint(size: int | torch.SymInt) -> int | None:
    """What the size was when the graph was traced, None where it depends on data; no guard.

    `int(size)` would be one.
    """
    if isinstance(size, torch.SymInt):
        return size.node.hint if size.node.has_hint() else None
    return int(size)


@contextlib.contextmanager
def without_guards(values: Iterable[Any]) -> Iterator[None]:
    """The fake mode of the first fake tensor among values, in which no guard is recorded.

    Meta kernels compare sizes, and a comparison of symbols would specialise the graph. Only the
    mode's `shape_env` can be told not to.
    """
    fakes = (value for value in tree_leaves(list(values)) if isinstance(value, FakeTensor))
    mode = next((fake.fake_mode for fake in fakes), None)
    if mode is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.suppress_guards())
        yield


def proved_sizes(size: torch.SymInt) -> dict[sympy.Symbol, sympy.Expr]:
    """Symbols of a size's graph that its guards prove to be expressions of other symbols.

    A table given by the user has a symbol of its own until it meets the tokens; from then on a
    guard says that its length is theirs. `ShapeEnv.guards` is read only.
    """
    proved: dict[Any, Any] = {}
    for guard in size.node.shape_env.guards:
        if not isinstance(guard.expr, sympy.Equality):
            continue
        sides = [side.xreplace(proved) for side in guard.expr.args]
        for symbol, other in (sides, sides[::-1]):
            if symbol.is_Symbol and symbol.is_integer and symbol not in other.free_symbols:
                known = {symbol: other}
                proved = {key: value.xreplace(known) for key, value in proved.items()} | known
                break
    return proved


def compile_with_inductor(
    gm: torch.fx.GraphModule, inputs: list[Any], patches: Mapping[str, Any]
) -> Callable[..., Any]:
    """Hand a graph over to Inductor. It takes ownership of `gm`.

    `torch.compile` is the public door to Inductor, but a backend is called from inside it.
    """
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, inputs, config_patches=dict(patches))
    return compiled


def allow_recompiles(count: int) -> None:
    """Let Dynamo compile one function for at least `count` different sets of guards.

    It counts every instance of a module as one.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, count)


_copies = itertools.count()


def fresh_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function or bound method with a code object of its own, which Dynamo has never seen.

    Dynamo keeps what it compiled, and the sizes that it has met, by code object and by its name;
    all instances of a class share one. What `torch.compile` had wrapped around it is left out.
    Anything else that can be called, as the partial functions of hooks, comes back in a function.
    """
    from torch._dynamo.eval_frame import innermost_fn

    plain = innermost_fn(function)
    inner = plain.__func__ if isinstance(plain, types.MethodType) else plain
    if not isinstance(inner, types.FunctionType):
        return fresh_code(lambda *args, **kwargs: plain(*args, **kwargs))
    code = inner.__code__
    copy = types.FunctionType(
        code.replace(co_name=f"{code.co_name}_copy_{next(_copies)}"),
        inner.__globals__,
        inner.__name__,
        inner.__defaults__,
        inner.__closure__,
    )
    copy.__kwdefaults__ = inner.__kwdefaults__
    copy.__dict__.update(inner.__dict__)
    return types.MethodType(copy, plain.__self__) if isinstance(plain, types.MethodType) else copy


@contextlib.contextmanager
def forget_compiled() -> Iterator[None]:
    """Drop on exit what Dynamo compiles inside, in this thread, for code it held nothing for.

    What it held before stays. Its reset is of everything in the process, and there is no public
    way to learn which code it compiled.
    """
    from torch._dynamo.convert_frame import register_bytecode_hook
    from torch._dynamo.eval_frame import (
        _debug_get_cache_entry_list,
        reset_code,  # pyright: ignore[reportPrivateImportUsage] - private
    )

    thread = threading.get_ident()
    found: dict[types.CodeType, bool] = {}

    def note(code: types.CodeType, new_code: types.CodeType) -> None:
        # an entry is made after its bytecode
        if threading.get_ident() == thread and code not in found:
            found[code] = not _debug_get_cache_entry_list(code)

    handle = register_bytecode_hook(note)
    try:
        yield
    finally:
        handle.remove()
        for code, is_new in found.items():
            if is_new:
                reset_code(code)


def expand_mode(mode: str) -> dict[str, Any]:
    """The Inductor settings that a `torch.compile` mode stands for.

    Raises:
        ValueError: `mode` is none of torch's; the message names those there are.
    """
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if mode not in modes:
        raise ValueError(f"{mode!r} is no torch.compile mode; there are {', '.join(sorted(modes))}")
    return dict(modes[mode])


def inductor_settings() -> frozenset[str]:
    """The names that Inductor takes as settings."""
    from torch._inductor import list_options

    return frozenset(list_options())


def mark_static_input(placeholder: Node) -> None:
    """Tell AOTAutograd and Inductor that a placeholder added by a pass keeps its address.

    Weights have the same mark. Without a source AOTAutograd refuses the graph; without the mark
    CUDA graphs copy the input at every call.
    """
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    placeholder._dynamo_source = ConstantSource(placeholder.name)  # type: ignore[attr-defined]


def parameter_path(placeholder: Node) -> tuple[str, ...] | None:
    """Where a placeholder's parameter lives, as `("blocks", "0", "attn1", "to_q", "weight")`.

    None for user inputs, buffers and unregistered tensors. Dynamo's source chain is read because
    placeholder names cannot be split: `norm_q` and `norm.q` give the same name.
    """
    if not isinstance(placeholder.meta.get("example_value"), torch.nn.Parameter):
        return None
    path: list[str] = []
    for source in _sources(placeholder):
        for attribute in ("index", "member"):
            value = getattr(source, attribute, None)
            if isinstance(value, (str, int)) and value not in _CONTAINERS:
                path.append(str(value))
    return tuple(reversed(path))


def belongs_to_model(placeholder: Node) -> bool:
    """Whether a placeholder is a parameter, a buffer or another attribute of a module.

    The others are what the user passes, and sizes.
    """
    if isinstance(placeholder.meta.get("example_value"), torch.nn.Parameter):
        return True
    kinds = (UnspecializedNNModuleSource, NNModuleSource, ParamBufferSource)
    return any(isinstance(source, kinds) for source in _sources(placeholder))


_CONTAINERS = ("__dict__", "_modules", "_parameters", "_buffers")


def _sources(placeholder: Node) -> Iterator[Any]:
    """Dynamo's chain of sources, from the tensor to the local variable."""
    source = getattr(placeholder, "_dynamo_source", None)
    while source is not None:
        yield source
        source = getattr(source, "base", None)


def operator_name(target: Any) -> str | None:
    """`"namespace.name"` of an operator, `"higher_order.name"` of a higher-order one, else None.

    The operator classes of the dispatcher have no public name.
    """
    if isinstance(target, OpOverload):
        return str(target.overloadpacket)
    if isinstance(target, OpOverloadPacket):
        return str(target)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target.name()}"
    return None


def writes_in_place(target: Any) -> bool:
    """Whether an operator of the dispatcher writes to its arguments; only its schema tells.

    Kernels and regions of the user's, which have none, may write to all that they are given.
    """
    if isinstance(target, HigherOrderOperator):
        return target.name() in ("triton_kernel_wrapper_mutation", "invoke_subgraph")
    if isinstance(target, OpOverloadPacket):
        # Those for `out=` are of a call that names it.
        names = [name for name in target.overloads() if "out" not in name]
        return any(getattr(target, name)._schema.is_mutable for name in names)
    return isinstance(target, OpOverload) and target._schema.is_mutable


def kernel_selections(graph: Graph) -> dict[Node, tuple[str, ...]]:
    """The entries and exits of `torch.nn.attention.sdpa_kernel`, each with the backends it selects.

    Dynamo writes the context manager as calls of a private function, one at each end.
    """
    selections = {}
    for node in graph.find_nodes(op="call_function", target=torch.nn.attention._sdpa_kernel):
        names = node.args[0]
        assert isinstance(names, (list, tuple))
        selections[node] = tuple(str(n.args[0]) if isinstance(n, Node) else str(n) for n in names)
    return selections


def is_tracing() -> bool:
    """Whether torch's structured trace goes anywhere; making its texts costs time."""
    return bool(trace_log.handlers)


def emit_artifact(name: str, text: str, encoding: str = "string") -> None:
    """Add a text to torch's structured trace (TORCH_TRACE, read by tlparse).

    `encoding` is "string" or "json". Free where no trace is being written.
    """
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=lambda: text,
    )


def cache_counts() -> tuple[int, int]:
    """Hits and misses of AOTAutograd's cache so far; it wraps Inductor's. For reports only.

    There is no public counter.
    """
    from torch._dynamo.utils import counters

    found = counters["aot_autograd"]
    return found["autograd_cache_hit"], found["autograd_cache_miss"]
