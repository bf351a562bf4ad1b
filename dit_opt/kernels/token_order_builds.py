"""Every configuration of the kernel that moves tokens, ready for compilation ahead of time.

Mirrors what `token_order_triton` would compile on first use.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from dit_opt.kernels import token_order_triton as _launcher
from dit_opt.kernels.aot import Build

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_ALIGNED = [["tt.divisibility", 16]]


def make_build(target: str, dim: int, dtype: torch.dtype, *, aligned: bool = True) -> Build:
    """One configuration; `aligned` false is what tensors of odd strides get."""
    kernel = _launcher.gather_rows_kernel
    padded_dim = triton.next_power_of_2(dim)
    constexprs = {
        "DIM": dim,
        "PADDED_DIM": padded_dim,
        "TILE": _launcher.choose_tile(padded_dim),
        # The launcher turns an integer argument of 1 into a constant.
        "stride_xd": 1,
    }
    pointers = {"p_x": f"*{_NAMES[dtype]}", "p_out": f"*{_NAMES[dtype]}", "p_rows": "*i64"}
    signature = {
        name: "constexpr" if name in constexprs else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    attrs = {
        (position,): _ALIGNED
        for position, name in enumerate(kernel.arg_names)
        if signature[name] != "constexpr" and (name in pointers or name.startswith("stride_"))
        if aligned or name in ("p_out", "p_rows")
    }
    return Build(
        config=f"gather rows D={dim} {_NAMES[dtype]}" + ("" if aligned else " unaligned"),
        target=target,
        kernel=f"{_launcher.__name__}:{kernel.__name__}",
        signature=signature,
        constexprs=constexprs,
        attrs=attrs,
        options={"num_warps": _launcher.WARPS},
    )


def list_builds(target: str) -> Iterator[Build]:
    """The shipped configurations for one target."""
    yield make_build(target, 128, torch.bfloat16)
    yield make_build(target, 128, torch.float32)
    yield make_build(target, 80, torch.float16)
    yield make_build(target, 128, torch.bfloat16, aligned=False)
