"""Bad arguments raise one clear sentence; tracing with symbolic sizes adds no guard."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dit_opt.kernels.block_sparse_attention.contract import new_outputs

from .plans import Case, flatten_tail, make_inputs


def change(position: int, function):
    """Arguments of a good call, with one of them replaced."""
    arguments = list(make_inputs(Case(bias=True)))
    arguments[position] = function(arguments[position])
    return arguments


def change_tail(position: int, function):
    """The same for a call with a tail: centroids, values and log_lengths are 9, 10 and 11."""
    arguments = list(flatten_tail(make_inputs(Case(bias=True, tail=True))))
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
    "part of a tail": (
        lambda: change_tail(10, lambda _: None),
        TypeError,
        "only 2 of the three.*summarize_blocks",
    ),
    "tail in another dtype": (lambda: change_tail(9, torch.Tensor.half), TypeError, "dtype of q"),
    "integer lengths": (lambda: change_tail(11, torch.Tensor.int), TypeError, "float32 log_len"),
    "tail of other blocks": (lambda: change_tail(8, lambda _: 32), ValueError, "use the block_k"),
    "tail of other heads": (
        lambda: [
            x.repeat(1, 3, 1, 1) if 9 <= i < 11 else x for i, x in enumerate(change_tail(9, abs))
        ],
        ValueError,
        "Hk or H, nk, D",
    ),
    "flat lengths": (lambda: change_tail(11, torch.Tensor.flatten), ValueError, "1, nk"),
    "lengths of other heads": (
        lambda: change_tail(11, lambda x: x.repeat(1, 3, 1)),
        ValueError,
        "H or 1, nk",
    ),
    "other device": (lambda: change(5, lambda b: b.to("meta")), ValueError, "one device"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused(arguments, error, message):
    operator = torch.ops.ditopt.block_sparse_attention_v3
    with pytest.raises(error, match=message):
        operator(*arguments())


def test_grad_is_fine_under_no_grad():
    arguments = change(0, torch.Tensor.requires_grad_)
    with torch.no_grad():
        out, _ = torch.ops.ditopt.block_sparse_attention_v3(*arguments)
    assert not out.requires_grad


def test_outputs_flatten_without_a_copy():
    out, lse = new_outputs(torch.empty(2, 3, 10, 8, dtype=torch.bfloat16))
    flat = out.transpose(1, 2).flatten(2)
    assert out.shape == (2, 3, 10, 8) and flat.data_ptr() == out.data_ptr()
    assert lse.shape == (2, 3, 10) and lse.dtype == torch.float32


@pytest.mark.parametrize("tail", [False, True])
def test_symbolic_sizes_add_no_guard(tail):
    def attend(q, k, v, counts, indices, bias, *summaries):
        operator = torch.ops.ditopt.block_sparse_attention_v3
        return operator(q, k, v, counts, indices, bias, 0.2, 64, 64, *summaries)

    arguments = flatten_tail(
        make_inputs(Case(batch=2, queries=150, keys=201, bias=True, tail=tail))
    )
    graph = make_fx(attend, tracing_mode="symbolic")(*arguments[:6], *arguments[9:])
    assert "block_sparse_attention_v3" in graph.code
    assert [str(guard.expr) for guard in graph.shape_env.guards] == []
