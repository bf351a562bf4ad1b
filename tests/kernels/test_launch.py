"""A launch tells the compiler what Triton would derive from the arguments of the same call."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels.aot import TARGETS, make_build
from dit_opt.kernels.launch import Launch
from tests.kernels.launched_kernels import copy_kernel


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def make_launch(**changes):
    args = {"p_in": meta(64), "p_out": meta(64), "p_none": None}
    args |= {"size": 48, "stride": 1, "span": 32, "eps": 0.5}
    return Launch(copy_kernel, (4,), args | changes, {"TILE": 16}, {"num_warps": 4})


def test_arguments_are_specialized_as_triton_does_it():
    found = make_launch(p_in=meta(64, dtype=torch.bfloat16)[1:]).specialize()
    assert found.signature == {
        "p_in": "*bf16",
        "p_out": "*fp32",
        "p_none": "constexpr",
        "size": "i32",
        "stride": "constexpr",
        "span": "i32",
        "eps": "fp32",
        "TILE": "constexpr",
    }
    assert found.constexprs == {"TILE": 16, "p_none": None, "stride": 1}
    # p_out and size; the first value of p_in is left out, and span is not specialized
    assert sorted(found.attrs) == [(1,), (3,)]


def test_a_size_of_one_is_no_constant_where_it_is_not_specialized():
    assert make_launch(span=1).specialize().signature["span"] == "i32"


def test_large_integers_take_64_bits():
    assert make_launch(size=2**31).specialize().signature["size"] == "i64"


@pytest.mark.parametrize("constexprs", [{}, {"TILE": 16, "OTHER": 1}, {"TILE": 16, "size": 2}])
def test_a_launch_that_disagrees_with_its_kernel_is_refused(constexprs):
    launch = dataclasses.replace(make_launch(), constexprs=constexprs)
    with pytest.raises(TypeError, match="give every parameter of the kernel once"):
        launch.specialize()


def test_an_argument_of_an_unknown_type_is_refused():
    with pytest.raises(TypeError, match="takes no argument like 'four' of str"):
        make_launch(size="four").specialize()


def test_a_build_is_found_again_by_its_name():
    build = make_build("sm_90", make_launch(), "copy")
    assert build.kernel == "tests.kernels.launched_kernels:copy_kernel"
    assert list(build.signature) == copy_kernel.arg_names
    assert build.options == {"num_warps": 4}


class RecordingKernel:
    """Stands in for a kernel: keeps what it is launched with."""

    __name__ = "recording"

    def __init__(self, events):
        self.events = events

    def __getitem__(self, grid):
        return lambda **arguments: self.events.append((grid, arguments))


def test_a_launch_runs_on_the_device_of_its_tensors(monkeypatch):
    events = []

    class Guard:
        def __init__(self, tensor):
            events.append(tensor)

        def __enter__(self):
            pass

        def __exit__(self, *error):
            events.append("out")

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    x = torch.ones(1)
    args = {"size": 3, "p_x": x}
    Launch(RecordingKernel(events), (2, 1), args, {"TILE": 4}, {"num_warps": 8}).run()
    arguments = {"size": 3, "p_x": x, "TILE": 4, "num_warps": 8}
    assert events[0] is x and events[1:] == [((2, 1), arguments), "out"]


def test_a_launch_without_tensors_has_no_device():
    with pytest.raises(TypeError, match="recording is launched without any tensor"):
        Launch(RecordingKernel([]), (1,), {"size": 3}, {}).run()


@pytest.mark.parametrize(
    "changes",
    [{}, {"span": 1}, {"stride": 16}, {"size": 2**31}, {"p_out": meta(8, dtype=torch.uint8)[1:]}],
    ids=str,
)
def test_specialization_is_that_of_tritons_own_launcher(changes):
    jit = pytest.importorskip("triton.runtime.jit")
    compiler = pytest.importorskip("triton.compiler")
    if not hasattr(jit, "create_function_from_signature"):
        pytest.skip("this Triton binds arguments in another way")
    launch = make_launch(**changes)
    backend = compiler.make_backend(TARGETS["sm_90"])
    bind = jit.create_function_from_signature(copy_kernel.signature, copy_kernel.params, backend)
    _, specialization, _ = bind(**launch.args, **launch.constexprs, **launch.options)
    found = launch.specialize()
    assert list(found.signature.values()) == [kind for kind, _ in specialization]
    divisible = [
        i for i, (kind, key) in enumerate(specialization) if kind != "constexpr" and key == "D"
    ]
    assert [position for (position,) in found.attrs] == divisible
