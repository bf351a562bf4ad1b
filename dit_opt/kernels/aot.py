"""Compiles Triton kernels ahead of time, without a GPU, and judges the machine code that comes out.

So a machine without a GPU can find spills, serialised matrix products and missing bulk copies.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from dit_opt.kernels.launch import Launch, Specialization
from dit_opt.kernels.machine_code import KernelReport, lint

log = logging.getLogger(__name__)

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Bytes of shared memory that one program may use.
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}


@dataclass(frozen=True)
class Build(Specialization):
    """One kernel in one configuration, as `compile_ahead` takes it.

    Attributes:
        config: a unique name of the configuration, for reports.
        kernel: "module:name" of the `triton.jit` function, which cannot be pickled itself.
        expects_wgmma: whether warpgroup matrix instructions must appear on sm_90.
        expects_roles: whether its warps must have roles of their own, with their own registers.
    """

    config: str
    target: str
    kernel: str
    options: Mapping[str, Any] = field(default_factory=dict)
    expects_wgmma: bool = False
    expects_roles: bool = False


def make_build(
    target: str,
    launch: Launch,
    config: str,
    *,
    expects_wgmma: bool = False,
    expects_roles: bool = False,
) -> Build:
    """The build of a launch, whose tensors may be meta tensors, for a target."""
    function = launch.kernel.fn
    return Build(
        **vars(launch.specialize()),
        config=config,
        target=target,
        kernel=f"{function.__module__}:{function.__name__}",
        options=launch.options,
        expects_wgmma=expects_wgmma,
        expects_roles=expects_roles,
    )


def make_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory, for the launches of builds; it counts as aligned."""
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_ahead(
    kernel: Any, found: Specialization, target: GPUTarget, **options: Any
) -> CompiledKernel:
    """Compile a `triton.jit` or `gluon.jit` function for a target that need not be present.

    Args:
        found: what it is compiled for, see `Launch.specialize`.
        options: num_warps, num_stages and other backend options.

    Raises:
        RuntimeError: the kernel is interpreted, so there is nothing to compile.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"{getattr(kernel, '__name__', kernel)} cannot be compiled because TRITON_INTERPRET "
            "is set; unset it before the kernel's module is imported."
        )
    make_source = ASTSource
    if kernel.is_gluon():
        # Imported here because Gluon is an experiment of Triton's that may change.
        from triton.experimental.gluon._runtime import GluonASTSource as make_source
    source = make_source(
        fn=kernel, signature=found.signature, constexprs=found.constexprs, attrs=found.attrs
    )
    return triton.compile(source, target=target, options=options)


def find_faults(build: Build, report: KernelReport) -> list[str]:
    """What is wrong with a compiled kernel, in words; empty if it may ship."""
    faults = []
    if report.spill_bytes:
        faults.append(f"spills {report.spill_bytes} bytes of registers")
    if build.target == "sm_90" and report.serialized:
        faults.append(f"serialises matrix products ({', '.join(report.serialized)})")
    if build.expects_wgmma and not report.wgmma:
        faults.append("has no warpgroup matrix product (HGMMA)")
    if build.expects_wgmma and not report.tma_loads:
        faults.append("has no bulk copy (UTMALDG)")
    if build.expects_wgmma and report.mma_sync:
        faults.append(f"has {report.mma_sync} matrix products of the old kind (mma.sync)")
    if build.expects_roles and not report.has_roles:
        faults.append("gives its warps no roles (setmaxnreg)")
    faults += [f"copies a box of {box} into a buffer of {size}" for box, size in report.misfits]
    limit = SHARED_LIMITS[build.target]
    if report.shared_bytes > limit:
        faults.append(f"needs {report.shared_bytes} bytes of shared memory, more than {limit}")
    return faults


def load_kernel(build: Build) -> Any:
    """The `triton.jit` function that a build names."""
    module, name = build.kernel.split(":")
    return getattr(importlib.import_module(module), name)


def check_build(build: Build) -> tuple[KernelReport, list[str]]:
    """Compile and lint one build: its report and its faults."""
    target = TARGETS[build.target]
    compiled = compile_ahead(load_kernel(build), build, target, **build.options)
    report = lint(compiled, build.config)
    log.debug("compiled %s for %s: %s", build.config, build.target, report)
    return report, find_faults(build, report)


def check_builds(
    builds: Iterable[Build], processes: int = 2, seconds: int = 120
) -> Iterator[tuple[Build, KernelReport, list[str]]]:
    """`check_build` for many builds, spread over processes that hold no state of this one.

    A build that does not compile is at fault, and so is one whose process dies or takes longer
    than `seconds`: the compiler aborts on some programs. The others go on without it.
    """
    left = list(builds)
    context = multiprocessing.get_context("spawn")
    alone = False
    while left:
        batch = left[:1] if alone else left[:]
        with ProcessPoolExecutor(1 if alone else processes, mp_context=context) as pool:
            futures = [pool.submit(_check_in_time, build, seconds) for build in batch]
            try:
                for build, future in zip(batch, futures):
                    report, faults = future.result()
                    left.pop(0)
                    yield build, report, faults
                alone = False
            except BrokenProcessPool:
                # Any of those that were under way may have done it, so the next one goes alone.
                if alone:
                    fault = f"kills the compiler, or takes it more than {seconds} seconds"
                    build = left.pop(0)
                    yield build, KernelReport.of_none(build.target, build.config), [fault]
                alone = not alone


def _check_in_time(build: Build, seconds: int) -> tuple[KernelReport, list[str]]:
    """`check_build` in a process that ends where it takes longer."""
    signal.alarm(seconds)
    try:
        return check_build(build)
    except Exception as error:
        log.warning("%s does not compile", build.config, exc_info=error)
        fault = f"does not compile: {type(error).__name__}: {error}".splitlines()[0]
        return KernelReport.of_none(build.target, build.config), [fault]
    finally:
        signal.alarm(0)
