"""Bad arguments raise one clear sentence; tracing with symbolic sizes adds no guard."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dit_opt.kernels.block_sparse_attention import block_sparse_attention
from dit_opt.kernels.block_sparse_attention.contract import new_outputs

from .plans import Case, make_inputs


def change(position: int, function):
    """Arguments of a good call, with one of them replaced."""
    arguments = list(make_inputs(Case(bias=True)))
    arguments[position] = function(arguments[position])
    return arguments


BAD = {
    "float64": (lambda: change(0, torch.Tensor.double), TypeError, "float64.*cast the inputs"),
    "mixed dtypes": (lambda: change(1, torch.Tensor.half), TypeError, "one dtype"),
    "int64 counts": (lambda: change(3, torch.Tensor.long), TypeError, "int32"),
    "bool bias": (lambda: change(5, torch.Tensor.bool), TypeError, "additive float32"),
    "grad": (lambda: change(0, torch.Tensor.requires_grad_), RuntimeError, "no_grad"),
    "three dimensions": (lambda: change(0, lambda q: q[0]), ValueError, r"\[B, H, N, D\]"),
    "other head dimension": (lambda: change(0, lambda q: q[..., :16]), ValueError, "agree"),
    "other value length": (lambda: change(2, lambda v: v[:, :, :9]), ValueError, "agree"),
    "no such groups": (
        lambda: change(0, lambda q: q[:, :1].expand(-1, 3, -1, -1)),
        ValueError,
        "3 query heads are no multiple of 2",
    ),
    "wide heads": (
        lambda: [x.repeat(1, 1, 1, 10) if i < 3 else x for i, x in enumerate(change(0, abs))],
        ValueError,
        "1 to 256, not 320",
    ),
    "odd block": (lambda: change(8, lambda _: 48), ValueError, "powers of two"),
    "negative scale": (lambda: change(6, lambda s: -s), ValueError, "positive"),
    "flat plan": (lambda: change(3, torch.Tensor.flatten), ValueError, "counts must be"),
    "plan for other blocks": (lambda: change(7, lambda _: 128), ValueError, "does not fit"),
    "bias for other keys": (lambda: change(5, lambda b: b[..., 1:]), ValueError, "Nk"),
    "other device": (lambda: change(5, lambda b: b.to("meta")), ValueError, "one device"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused(arguments, error, message):
    operator = torch.ops.ditopt.block_sparse_attention_v1
    with pytest.raises(error, match=message):
        operator(*arguments())


def test_grad_is_fine_under_no_grad():
    arguments = change(0, torch.Tensor.requires_grad_)
    with torch.no_grad():
        out, _ = torch.ops.ditopt.block_sparse_attention_v1(*arguments)
    assert not out.requires_grad


def test_outputs_flatten_without_a_copy():
    out, lse = new_outputs(torch.empty(2, 3, 10, 8, dtype=torch.bfloat16))
    flat = out.transpose(1, 2).flatten(2)
    assert out.shape == (2, 3, 10, 8) and flat.data_ptr() == out.data_ptr()
    assert lse.shape == (2, 3, 10) and lse.dtype == torch.float32


def test_symbolic_sizes_add_no_guard():
    def attend(q, k, v, counts, indices, bias):
        return block_sparse_attention(q, k, v, counts, indices, bias, 0.2, 64, 64)

    arguments = make_inputs(Case(batch=2, queries=150, keys=201, bias=True))
    graph = make_fx(attend, tracing_mode="symbolic")(*arguments[:6])
    assert "block_sparse_attention_v1" in graph.code
    assert [str(guard.expr) for guard in graph.shape_env.guards] == []
