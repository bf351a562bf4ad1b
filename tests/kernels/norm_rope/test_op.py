"""The registered op: schema, fake and real kernels agree, in eager and in compiled graphs."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.norm_rope import norm_rope
from dit_opt.kernels.norm_rope.contract import Arguments, check_arguments

from .scenes import LAYOUTS, SCENES, Scene, make_inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_opcheck(scene, dtype):
    operator = torch.ops.ditopt.norm_rope_v1.default
    results = torch.library.opcheck(operator, make_inputs(scene, dtype))
    assert set(results.values()) == {"SUCCESS"}
    assert "test_aot_dispatch_dynamic" in results


@pytest.mark.parametrize("rows", [None, "shared", "per head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_result_depends_on_the_order_only(layout, rows):
    arguments = make_inputs(Scene(layout=layout, rows=rows), torch.float16)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    found, described = norm_rope(*arguments), norm_rope(*meta)
    assert found.shape == described.shape == (2, 3, 70, 24)
    assert found.dtype == described.dtype == torch.float16
    assert found.stride() == described.stride()
    memory = found if rows else found.transpose(1, 2)
    assert memory.is_contiguous()


def test_the_result_is_no_view_of_the_input():
    x = make_inputs(Scene())[0]
    out = norm_rope(x)
    assert torch.equal(out, x.transpose(1, 2))
    out.zero_()
    assert x.abs().sum() > 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_holds_one_op_and_gives_the_same(dynamic):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=keep, fullgraph=True, dynamic=dynamic)
    def prepare(*arguments):
        return torch.ops.ditopt.norm_rope_v1(*arguments).transpose(1, 2).flatten(2)

    for tokens in (70, 91):
        arguments = make_inputs(Scene(tokens=tokens, start=9, rotated=tokens - 9))
        found = prepare(*arguments)
        assert torch.equal(found, norm_rope(*arguments).transpose(1, 2).flatten(2))
    assert len(graphs) == (1 if dynamic else 2)
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("norm_rope_v1" in name for name in names) == 1


def test_a_gpu_kernel_is_registered():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("ditopt::norm_rope_v1", "CUDA")


ERRORS = {
    "three dimensions": (lambda a: a | {"x": a["x"].flatten(2)}, r"\[B, N, H, D\], not \(2, 70, 7"),
    "dtype": (lambda a: a | {"x": a["x"].double()}, "dtype torch.float64"),
    "weight of all heads": (lambda a: a | {"weight": torch.ones(72)}, r"\[24\].*not \(72,\)"),
    "weight of one head": (lambda a: a | {"across_heads": True}, r"\[72\].*not \(24,\)"),
    "weight without norm": (lambda a: a | {"eps": -1.0}, "eps=-1.0 asks for no normalisation"),
    "cos alone": (lambda a: a | {"sin": None}, "cos was given, but sin is None"),
    "sin alone": (lambda a: a | {"cos": None}, "sin was given, but cos is None"),
    "odd channels": (
        lambda a: a | {"x": a["x"][..., :23], "weight": None},
        "the 23 channels of a head make no pairs",
    ),
    "complex": (lambda a: a | {"cos": a["cos"].cfloat()}, "must be real, not torch.complex64"),
    "unlike tables": (lambda a: a | {"sin": a["sin"][:-1]}, r"not \(70, 24\) and \(69, 24\)"),
    "narrow tables": (
        lambda a: a | {"cos": a["cos"][:, :8], "sin": a["sin"][:, :8]},
        r"\[M, 24\].*\[M, 12\].*not \(70, 8\)",
    ),
    "batched tables": (
        lambda a: a | {"cos": a["cos"][None], "sin": a["sin"][None]},
        r"not \(1, 70, 24\)",
    ),
    "beyond the end": (lambda a: a | {"rope_start": 1}, "the 70 tokens from 1 on are not all"),
    "before the start": (lambda a: a | {"rope_start": -1}, "the 70 tokens from -1 on are not all"),
    "rows of int32": (lambda a: a | {"rows": a["rows"].int()}, "int64.*not torch.int32"),
    "rows of all heads": (lambda a: a | {"rows": a["rows"][:, :1]}, r"\[2, 3, 70\].*\(2, 1, 70\)"),
}
NAMES = ("x", "weight", "eps", "across_heads", "cos", "sin", "halves", "rope_start", "rows")


@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_say_what_does_not_fit(change, message):
    arguments = dict(zip(NAMES, make_inputs(Scene(rows="per head")), strict=True))
    norm_rope(**arguments)
    with pytest.raises(ValueError, match=message):
        norm_rope(**change(arguments))


def test_tensors_of_two_devices():
    x, weight, *others = make_inputs(Scene())
    # The check itself is called: the dispatcher would take the fake for a meta tensor.
    with pytest.raises(ValueError, match="one device, not cpu, meta"):
        check_arguments(Arguments(x, weight.to("meta"), *others))
