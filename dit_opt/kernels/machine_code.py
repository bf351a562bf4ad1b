"""Reads what a compiled kernel costs from its machine code.

Register spills, serialised tensor instructions and missing bulk copies are visible in the binary,
and in the intermediate code whether each bulk copy fills the buffer that it is given.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import CompiledKernel


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
        has_roles: whether warps take registers of their own (setmaxnreg), as specialised ones do.
        misfits: bulk copies whose box has another shape than the buffer that it is copied into,
            both as text: the compiler can make such code, which overwrites what lies behind.
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
    has_roles: bool = False
    misfits: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of_none(cls, target: str, config: str) -> KernelReport:
        """Of a kernel that was not compiled."""
        return cls(target, config, 0, 0, 0, 0, 0, 0, ())


def lint(compiled: CompiledKernel, config: str = "") -> KernelReport:
    """Disassemble a compiled kernel and report what it costs.

    Raises:
        RuntimeError: a tool bundled with Triton fails or prints something unknown.
    """
    if compiled.metadata.target.backend == "hip":
        return _lint_amd(compiled, config)
    return _lint_nvidia(compiled, config)


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
        has_roles="setmaxnreg" in compiled.asm["ptx"],
        misfits=find_misfits(compiled.asm["ttgir"]),
    )


def find_misfits(code: str) -> tuple[tuple[str, str], ...]:
    """Boxes and buffers of bulk copies in TTGIR that differ, axes of one element left out.

    Raises:
        RuntimeError: a copy whose types are written in an unknown way.
    """
    misfits = []
    for line in code.splitlines():
        if "async_tma_copy_global_to_local" not in line:
            continue
        box = re.search(r"!tt\.tensordesc<(?:tensor<)?([\dx]+)x\w+", line)
        buffer = re.search(r"-> !ttg\.memdesc<([\dx]+)x\w+", line)
        if box is None or buffer is None:
            raise RuntimeError(f"No box or no buffer in this copy of the compiler's: {line[:500]}")
        shapes = tuple("x".join(n for n in m[1].split("x") if n != "1") for m in (box, buffer))
        if shapes[0] != shapes[1]:
            misfits.append(shapes)
    return tuple(misfits)


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
