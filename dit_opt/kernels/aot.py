"""Compiles Triton kernels ahead of time, without a GPU, and reads the machine code that comes out.

Register spills, serialised tensor instructions and missing bulk copies are visible in the binary,
so a machine without any GPU can tell whether a kernel is still the one that was meant.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

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
class Build:
    """One kernel in one configuration, as `compile_ahead` takes it.

    Attributes:
        config: what tells this configuration from the others, for reports.
        kernel: where the `triton.jit` function is, "module:name" (it cannot be pickled itself).
        signature: Triton type of each argument ("*bf16", "i32", "constexpr", "tensordesc<...>").
        attrs: facts about arguments that the launcher would derive, by position.
        expects_wgmma: whether warpgroup matrix instructions must appear on sm_90.
    """

    config: str
    target: str
    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: Mapping[tuple[int, ...], list[list[Any]]]
    options: Mapping[str, Any] = field(default_factory=dict)
    expects_wgmma: bool = False


@dataclass(frozen=True)
class KernelReport:
    """What the machine code of one compiled kernel shows.

    Attributes:
        registers: per thread (vector registers on AMD).
        spill_bytes: stored to local memory for lack of registers (on AMD, 4 per spilled register).
        shared_bytes: of one program.
        wgmma, tma_loads: HGMMA and UTMALDG instructions (Hopper's matrix product and bulk copy);
            on Blackwell tcgen05.mma and bulk copies.
        mma_sync: matrix products of the older, per-warp kind (MFMA on AMD).
        serialized: ptxas warning codes (C75xx) that say matrix products do not overlap.
    """

    target: str
    config: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: int
    tma_loads: int
    mma_sync: int
    serialized: tuple[str, ...]


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    attrs: Mapping[tuple[int, ...], list[list[Any]]],
    target: GPUTarget,
    **options: Any,
) -> CompiledKernel:
    """Compile a `triton.jit` function for a target that need not be present.

    Args:
        signature: type of every argument by name, "constexpr" for those in `constexprs`.
        attrs: for instance {(0,): [["tt.divisibility", 16]]} for an aligned first pointer.
        options: num_warps, num_stages and other backend options.

    Raises:
        RuntimeError: the kernel is interpreted, so there is nothing to compile.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"{getattr(kernel, '__name__', kernel)} cannot be compiled because TRITON_INTERPRET "
            "is set; unset it before the kernel's module is imported."
        )
    source = ASTSource(
        fn=kernel, signature=dict(signature), constexprs=dict(constexprs), attrs=dict(attrs)
    )
    return triton.compile(source, target=target, options=options)


def lint(compiled: CompiledKernel, config: str = "") -> KernelReport:
    """Disassemble a compiled kernel and report what it costs.

    Raises:
        RuntimeError: a tool bundled with Triton fails or prints something unknown.
    """
    if compiled.metadata.target.backend == "hip":
        return _lint_amd(compiled, config)
    return _lint_nvidia(compiled, config)


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
    compiled = compile_ahead(
        load_kernel(build),
        build.signature,
        build.constexprs,
        build.attrs,
        TARGETS[build.target],
        **build.options,
    )
    report = lint(compiled, build.config)
    log.debug("compiled %s for %s: %s", build.config, build.target, report)
    return report, find_faults(build, report)


def check_builds(
    builds: Iterable[Build], processes: int = 2
) -> Iterator[tuple[Build, KernelReport, list[str]]]:
    """`check_build` for many builds, spread over processes that hold no state of this one."""
    builds = list(builds)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for build, (report, faults) in zip(builds, pool.map(check_build, builds), strict=True):
            yield build, report, faults


def _lint_nvidia(compiled: CompiledKernel, config: str) -> KernelReport:
    arch = int(compiled.metadata.target.arch)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        # Triton drops the warnings of its own ptxas run, hence a second one.
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        log_text = _run(_find_tool("ptxas", arch), "-v", "--gpu-name", name, ptx, "-o", cubin)
        code = compiled.asm["ptx"]
        if arch == 90:
            # Only here the counts are judged, so that the machine code has to tell them.
            code = _run(_find_tool("nvdisasm", arch), "-c", "-ndf", cubin)
    return KernelReport(
        target=f"sm_{arch}",
        config=config,
        registers=_read_number(r"Used (\d+) registers", log_text),
        spill_bytes=_read_number(r"(\d+) bytes spill stores", log_text),
        shared_bytes=compiled.metadata.shared,
        wgmma=len(re.findall(r"\b[HQI]GMMA|\btcgen05\.mma\.", code)),
        tma_loads=len(re.findall(r"\bUTMALDG|\bcp\.async\.bulk\.tensor\.", code)),
        mma_sync=len(re.findall(r"\b[HQI]MMA\.|\bmma\.sync\.", code)),
        serialized=tuple(sorted(set(re.findall(r"\(?(C75\d\d)\)?", log_text)))),
    )


def _lint_amd(compiled: CompiledKernel, config: str) -> KernelReport:
    code = compiled.asm["amdgcn"]
    return KernelReport(
        target=compiled.metadata.target.arch,
        config=config,
        registers=_read_number(r"\.vgpr_count:\s+(\d+)", code),
        spill_bytes=4 * _read_number(r"\.vgpr_spill_count:\s+(\d+)", code),
        shared_bytes=compiled.metadata.shared,
        wgmma=0,
        tma_loads=0,
        mma_sync=code.count("v_mfma"),
        serialized=(),
    )


def _find_tool(name: str, arch: int) -> Path:
    """A binary that Triton bundles; Blackwell has an assembler of its own."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    newest = folder / f"{name}-blackwell"
    path = newest if arch >= 100 and newest.exists() else folder / name
    if not path.exists():
        raise RuntimeError(f"{path} is missing; install the Triton wheel, which bundles it.")
    return path


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with status {done.returncode}: {done.stderr}")
    return done.stdout + done.stderr


def _read_number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"No {pattern!r} in the output of the compiler: {text[:500]}")
    return int(found[1])
