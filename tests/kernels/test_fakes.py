"""A fake's source changes together with its op's version.

Compile caches key a graph by the names of its ops, not by what their fakes do: a changed fake under
an old name would let a cached graph of other shapes or strides run.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap

import pytest
import torch
from torch._library.simple_registry import singleton as registry

import dit_opt.backend  # noqa: F401  registers every op

# By op: of its fake and what that calls. A fake that changes takes the next version in the op's
# name, and its new hash here.
RECORDED = {
    "adaspa_plan_v2": "70a0bcf14a69",
    "block_sparse_attention_v3": "5368bd6ffcea",
    "cube_order_v1": "312e43df89c6",
    "frame_tile_plan_v1": "f535676374fd",
    "gather_bias_v1": "e7a27e82a0e3",
    "gather_tokens_v1": "459d78a9185c",
    "guard_plan_v1": "ccb4881a12bf",
    "headwise_plan_v2": "d5822250ff75",
    "headwise_rows_v1": "fc7b990fc994",
    "headwise_search_or_reuse_v1": "1ce5c00dcf6f",
    "keep_all_v1": "7f52f0a59d84",
    "norm_rope_v1": "2f4f1aae1e40",
    "pack_plan_v1": "fd203943231d",
    "rainfusion_plan_v1": "a6ebf8b34927",
    "rainfusion_recognize_v1": "1e702bc7e6e1",
    "scatter_tokens_v1": "ce262619d4b3",
    "subblock_plan_v2": "70a0bcf14a69",
    "unpack_plan_v1": "6dd20cab8612",
}


def list_fakes():
    """The fake of every op of ditopt that has one, by the op's name."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("ditopt::")]
    kernels = {name: registry.find(name).fake_impl.kernel for name in sorted(names)}
    return {
        # torch wraps the function that was registered
        name.removeprefix("ditopt::"): inspect.getclosurevars(kernel.func).nonlocals["func"]
        for name, kernel in kernels.items()
        if kernel is not None
    }


def list_functions(function, found=None):
    """A function and those of this package that it calls, each once."""
    found = {} if found is None else found
    if inspect.isfunction(function) and function.__module__.startswith("dit_opt."):
        name = f"{function.__module__}.{function.__qualname__}"
        if name not in found:
            found[name] = function
            used = function.__code__.co_names
            known = [function.__globals__.get(name) for name in used]
            for module in filter(inspect.ismodule, known):
                known = known + [getattr(module, name, None) for name in used]
            for other in known:
                list_functions(other, found)
    return found.values()


def normalise(function):
    """The source without the function's name, its decorators, docstrings, comments and layout."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.name, node.decorator_list = "_", []
            if ast.get_docstring(node) is not None:
                del node.body[0]
    return ast.unparse(tree)


def hash_fake(fake):
    digest = hashlib.sha256()
    for source in sorted(map(normalise, list_functions(fake))):
        digest.update(source.encode())
    return digest.hexdigest()[:12]


@pytest.mark.parametrize(("name", "fake"), list_fakes().items(), ids=list_fakes())
def test_a_fake_is_that_of_the_ops_version(name, fake):
    found = hash_fake(fake)
    assert RECORDED.get(name) == found, (
        f"The fake of ditopt::{name} is not the recorded one. Where an op of that name was ever "
        f'released, give the changed op the next version; then record "{name}": "{found}".'
    )


def test_every_recorded_op_is_there():
    assert set(RECORDED) == set(list_fakes())


def test_words_do_not_count_and_called_functions_do():
    def measure():
        """Words."""
        # more words
        return 1

    def described():
        return 1

    assert normalise(measure) == normalise(described)
    gather = list_fakes()["norm_rope_v1"]
    names = {function.__name__ for function in list_functions(gather)}
    assert {"_fake", "new_output"} <= names
