"""Contracts of the private torch names: when torch changes one, a test here says which."""

from __future__ import annotations

import functools
import logging

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_opt import _compat
from tests.graphs import capture_one


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"norm_q": nn.Linear(4, 4)})])
        self.register_buffer("table", torch.ones(4))
        self.loose = torch.ones(4)

    def forward(self, x):
        return self.blocks[0]["norm_q"](x) * self.table + self.loose


def placeholders(gm):
    return {n.name: n for n in gm.graph.find_nodes(op="placeholder")}


def test_size_expression_adds_no_guard():
    gm = capture_one(lambda x: x.reshape(-1) + 1, torch.ones(6, 4), dynamic=True)
    x = gm.graph.find_nodes(op="placeholder")[-1].meta["example_value"]
    environment = x.shape[0].node.shape_env
    before = len(environment.guards)
    size = _compat.size_expression(x.shape[0])
    assert size.is_Symbol and size != _compat.size_expression(x.shape[1])
    assert len(environment.guards) == before
    assert _compat.size_expression(7) == sympy.Integer(7)


def test_size_hint_adds_no_guard():
    gm = capture_one(lambda x: x.reshape(-1) + 1, torch.ones(6, 4), dynamic=True)
    x = gm.graph.find_nodes(op="placeholder")[-1].meta["example_value"]
    environment = x.shape[0].node.shape_env
    before = len(environment.guards)
    assert [_compat.size_hint(size) for size in x.shape] == [6, 4]
    assert len(environment.guards) == before
    assert _compat.size_hint(7) == 7
    assert _compat.size_hint(environment.create_unbacked_symint()) is None


def test_proved_sizes_are_those_that_guards_tie():
    def scale(x, table):
        return x.flatten(1) * table

    gm = capture_one(scale, torch.ones(2, 6, 4), torch.ones(24), dynamic=True)
    x, table = (n.meta["example_value"] for n in gm.graph.nodes if n.name in ("l_x_", "l_table_"))
    environment = x.shape[1].node.shape_env
    before = len(environment.guards)
    length = _compat.size_expression(table.shape[0])
    sizes = [_compat.size_expression(s) for s in x.shape]
    proved = _compat.proved_sizes(x.shape[1])
    assert sympy.expand(length.xreplace(proved) - sizes[1] * sizes[2]) == 0
    assert all(s.xreplace(proved) == s for s in sizes)
    assert len(environment.guards) == before


def test_operators_that_write_in_place():
    assert _compat.writes_in_place(torch.ops.aten.add_.Tensor)
    assert _compat.writes_in_place(torch.ops.aten.add.out)
    assert not _compat.writes_in_place(torch.ops.aten.add.Tensor)
    assert not _compat.writes_in_place("add_")
    assert _compat.writes_in_place(torch.ops.aten.add_)
    assert not _compat.writes_in_place(torch.ops.aten.add)
    # what Dynamo writes for a Triton kernel of the user's, and for a region compiled once
    assert _compat.writes_in_place(torch.ops.higher_order.triton_kernel_wrapper_mutation)
    assert _compat.writes_in_place(torch.ops.higher_order.invoke_subgraph)
    assert not _compat.writes_in_place(torch.ops.higher_order.flex_attention)


def test_meta_kernels_that_compare_sizes_add_no_guard():
    gm = capture_one(lambda x: x + 1, torch.ones(6, 4), dynamic=True)
    x = gm.graph.find_nodes(op="placeholder")[-1].meta["example_value"]
    environment = x.shape[0].node.shape_env
    before = len(environment.guards)
    with _compat.without_guards([[3], {"x": x}]):
        assert x.shape[0] == 6
        made = torch.empty(3)
    # what is made there is fake, of the mode that x has
    assert _compat.is_fake(made) and made.fake_mode is x.fake_mode
    assert len(environment.guards) == before
    assert x.shape[0] == 6 and len(environment.guards) > before
    with _compat.without_guards([3, torch.ones(2)]):
        assert not _compat.is_fake(torch.empty(3))


def test_tensors_without_values_are_told():
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = torch.ones(2)
    fake = FakeTensorMode().from_tensor(real)
    assert _compat.is_fake(fake) and not _compat.is_fake(real)


def test_floor_division_and_modulo():
    size = sympy.Symbol("s0", integer=True, positive=True)
    assert _compat.FloorDiv(size + 31, 32).subs(size, 33) == 2
    assert _compat.Mod(size, 32).subs(size, 33) == 1
    assert _compat.PythonMod(-size, 32).subs(size, 33) == 31


def test_modes():
    assert _compat.expand_mode("default") == {}
    assert _compat.expand_mode("max-autotune")["max_autotune"] is True
    with pytest.raises(ValueError, match=r"'fastest' is no torch.compile mode.*reduce-overhead"):
        _compat.expand_mode("fastest")


def test_recompiles_are_allowed_and_never_forbidden():
    from torch._dynamo import config

    with config.patch(recompile_limit=8):
        _compat.allow_recompiles(20)
        assert config.recompile_limit == 20
        _compat.allow_recompiles(4)
        assert config.recompile_limit == 20


def test_inductor_settings():
    assert {"max_autotune", "triton.cudagraphs"} <= _compat.inductor_settings()


def test_compile_with_inductor():
    def backend(gm, inputs):
        return _compat.compile_with_inductor(gm, inputs, {"max_autotune": False})

    x = torch.arange(4.0)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(lambda x: x * 2 + 1, backend=backend)(x), x * 2 + 1)
    torch.compiler.reset()


def test_parameter_paths():
    gm = capture_one(Model(), torch.ones(2, 4))
    paths = [_compat.parameter_path(n) for n in gm.graph.find_nodes(op="placeholder")]
    assert sorted(p for p in paths if p) == [
        ("blocks", "0", "norm_q", "bias"),
        ("blocks", "0", "norm_q", "weight"),
    ]
    assert len(paths) == 5


def test_what_belongs_to_the_model():
    gm = capture_one(Model(), torch.ones(2, 4))
    owned = {name: _compat.belongs_to_model(n) for name, n in placeholders(gm).items()}
    assert [name for name, is_owned in owned.items() if not is_owned] == ["l_x_"]
    assert len(owned) == 5


def test_static_mark():
    # what Dynamo itself writes for parameters
    gm = capture_one(Model().requires_grad_(False), torch.ones(2, 4))
    weight = next(n for n in placeholders(gm).values() if _compat.parameter_path(n))
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        node = gm.graph.placeholder("state")
    _compat.mark_static_input(node)
    assert node.meta["tensor_dict"] == weight.meta["tensor_dict"]
    assert isinstance(node._dynamo_source, _compat.ConstantSource)


def test_operator_names():
    assert _compat.operator_name(torch.ops.aten.add) == "aten.add"
    assert _compat.operator_name(torch.ops.aten.add.Tensor) == "aten.add"
    assert _compat.operator_name(torch.add) is None
    assert _compat.operator_name("add") is None
    from torch.nn.attention.flex_attention import flex_attention

    gm = capture_one(lambda q: flex_attention(q, q, q), torch.randn(1, 1, 128, 16))
    names = [_compat.operator_name(n.target) for n in gm.graph.nodes]
    assert "higher_order.flex_attention" in names


def test_kernel_selections():
    def attend(q):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, q, q)

    selections = _compat.kernel_selections(capture_one(attend, torch.randn(1, 1, 4, 4)).graph)
    entry, leave = selections.values()
    assert entry == ("MATH",) and len(leave) > 1


def test_artifacts_reach_the_structured_trace():
    records = []

    class Collect(logging.Handler):
        def emit(self, record):
            records.append((record.metadata, record.payload))

    handler = Collect()
    _compat.trace_log.addHandler(handler)
    level = _compat.trace_log.level
    _compat.trace_log.setLevel(logging.DEBUG)
    try:
        assert _compat.is_tracing()
        _compat.emit_artifact("ditopt_00", "text")
    finally:
        _compat.trace_log.removeHandler(handler)
        _compat.trace_log.setLevel(level)
    metadata, payload = records[-1]
    assert metadata["artifact"] == {"name": "ditopt_00", "encoding": "string"}
    assert payload == "text"


def test_cache_counts():
    hits, misses = _compat.cache_counts()
    assert hits >= 0 and misses >= 0
    from torch._dynamo.utils import counters

    counters["aot_autograd"]["autograd_cache_hit"] += 1
    try:
        assert _compat.cache_counts() == (hits + 1, misses)
    finally:
        counters["aot_autograd"]["autograd_cache_hit"] -= 1


def test_an_exception_of_a_backend_is_handed_on():
    class Stop(Exception):
        pass

    def backend(gm, inputs):
        raise Stop

    with pytest.raises(_compat.BackendCompilerFailed) as caught:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert isinstance(caught.value.inner_exception, Stop)


class Scale:
    def scale(self, x, by=2, *, more=1):
        return x * by + more


def test_fresh_code_is_the_same_function_with_other_code():
    method = Scale().scale
    copies = [_compat.fresh_code(method) for _ in range(2)]
    assert len({c.__func__.__code__ for c in (method, *copies)}) == 3
    assert len({c.__func__.__code__.co_name for c in (method, *copies)}) == 3
    assert [c(3) for c in copies] == [7, 7] and copies[0].__self__ is method.__self__
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    assert not hasattr(_compat.fresh_code(compiled), "_torchdynamo_orig_callable")
    wrapped = [_compat.fresh_code(functools.partial(Scale().scale, by=5)) for _ in range(2)]
    assert wrapped[0].__code__ is not wrapped[1].__code__ and wrapped[0](3, more=2) == 17


def test_only_what_is_new_to_dynamo_is_forgotten():
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    def old(x):
        return x + 1

    def new(x):
        torch._dynamo.graph_break()
        return x + 2

    torch.compile(old, backend="eager")(torch.ones(2))
    with _compat.forget_compiled():
        torch.compile(new, backend="eager")(torch.ones(2))
        torch.compile(old, backend="eager")(torch.ones(3))
        assert _debug_get_cache_entry_list(new.__code__)
    assert not _debug_get_cache_entry_list(new.__code__)
    assert _debug_get_cache_entry_list(old.__code__)
    torch.compile(new, backend="eager")(torch.ones(2))
    assert _debug_get_cache_entry_list(new.__code__)
