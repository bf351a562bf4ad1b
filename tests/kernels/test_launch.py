"""A launch tells the compiler what Triton would derive from the arguments of the same call."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels.aot import make_build
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
