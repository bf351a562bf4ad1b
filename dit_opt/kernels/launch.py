"""One launch of a Triton kernel as data, for the GPU to run and for the linter to compile.

Launchers return a `Launch`. `Launch.run` starts it, and `aot.make_build` compiles the same launch
ahead of time from meta tensors, so that the linter sees exactly what a call would compile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16
_DIVISIBLE = [["tt.divisibility", ALIGNMENT]]
# Types of elements as Triton writes them.
TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Specialization:
    """What Triton compiles a kernel for.

    Attributes:
        signature: Triton type of each argument in order ("*bf16", "i32", "tensordesc<...>"),
            "constexpr" for those in `constexprs`.
        constexprs: the kernel's own constants, and arguments that Triton turns into some.
        attrs: facts about arguments, by position.
    """

    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel and all that one launch of it passes.

    Attributes:
        kernel: a `triton.jit` or `gluon.jit` function.
        args: tensors, tensor descriptors, numbers and None, by the kernel's names.
        constexprs: values of the `tl.constexpr` parameters.
        options: num_warps, num_stages and other options of the compiler.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Launch on the GPU that holds the tensors, or on CPU tensors under TRITON_INTERPRET=1."""
        # Triton launches on torch's current device, where the tensors need not lie.
        with torch.cuda.device_of(self._find_tensor()):
            self.kernel[self.grid](**self.args, **self.constexprs, **self.options)

    def specialize(self) -> Specialization:
        """What Triton would compile for this launch; meta tensors will do.

        Follows Triton: an integer of 1 and None become constants; pointers and integers that
        16 divides are compiled for that, unless the kernel declares `do_not_specialize`.

        Raises:
            TypeError: arguments that are not those of the kernel, or of an unknown type.
        """
        names = list(self.kernel.arg_names)
        given = {**self.args, **self.constexprs}
        if set(names) != set(given) or len(given) != len(self.args) + len(self.constexprs):
            odd = sorted(set(names) ^ set(given) | set(self.args) & set(self.constexprs))
            raise TypeError(
                f"{self.kernel.__name__} and its launch disagree about {', '.join(odd)}; give "
                "every parameter of the kernel once."
            )
        found = Specialization({}, dict(self.constexprs), {})
        for position, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, given[parameter.name]
            is_fixed = parameter.do_not_specialize
            if name in self.constexprs:
                found.signature[name] = "constexpr"
            elif value is None or (type(value) is int and value == 1 and not is_fixed):
                found.signature[name] = "constexpr"
                found.constexprs[name] = value
            else:
                found.signature[name] = name_type(value)
                if not is_fixed and _is_divisible(value):
                    found.attrs[(position,)] = _DIVISIBLE
        return found

    def _find_tensor(self) -> Tensor:
        for value in self.args.values():
            if isinstance(value, Tensor):
                return value
        raise TypeError(
            f"{self.kernel.__name__} is launched without any tensor, so its device is unknown; "
            "pass an output at least."
        )


def next_power_of_2(size: int) -> int:
    """The least power of 2 that is no less than `size`."""
    return 1 << (size - 1).bit_length()


def name_strides(tensor: str, axes: str, x: Tensor | None) -> dict[str, int]:
    """The strides of the first axes by the names that kernels give them, as in "stride_qb".

    They are 0 for None, of which nothing is read.
    """
    strides = (0,) * len(axes) if x is None else x.stride()
    return {f"stride_{tensor}{axis}": stride for axis, stride in zip(axes, strides)}


def name_type(value: Any) -> str:
    """The type of an argument as Triton writes it. TypeError where it is none that kernels take."""
    if hasattr(value, "block_shape"):
        tile = ", ".join(map(str, value.block_shape))
        # A descriptor of Gluon's says how its tile is laid out.
        layout = "" if isinstance(value, TensorDescriptor) else f",{value.layout!r}"
        return f"tensordesc<{TYPE_NAMES[value.base.dtype]}[{tile}]{layout}>"
    if isinstance(value, Tensor) and value.dtype in TYPE_NAMES:
        return f"*{TYPE_NAMES[value.dtype]}"
    if type(value) is int:
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if type(value) is float:
        return "fp32"
    raise TypeError(f"A kernel takes no argument like {value!r} of {type(value).__name__}.")


def _is_divisible(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % ALIGNMENT == 0
    return type(value) is int and value % ALIGNMENT == 0


def read_architecture(device: torch.device) -> str:
    """The architecture of a device as Triton names it: "sm_90", "gfx942", ...

    The interpreter, which runs on CPU tensors, stands in for "sm_90".
    """
    if device.type == "cpu":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
