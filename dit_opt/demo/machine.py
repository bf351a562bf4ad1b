"""Which machine and which versions a measurement was made with.

A figure without them cannot be compared with another one.
"""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dit_opt

PACKAGES = ("torch", "triton", "diffusers", "numpy")


def describe_machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Processor, its vector instructions, cores, threads, memory in GiB; the accelerator if any."""
    device = torch.device(device)
    machine = {
        "cpu": _name_cpu(),
        # One name covers processors with and without AVX-512, which ratios depend on, too.
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "device": str(device),
    }
    if device.type == "cuda":
        machine["accelerator"] = torch.cuda.get_device_name(device)
    return machine


def list_versions() -> dict[str, str | None]:
    """Versions of Python, ditopt and what it stands on; None for what is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "dit_opt": dit_opt.__version__,
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def read_date() -> str:
    """The time now, in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def describe_run(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What every file of results ends with: machine, versions and date."""
    return {"machine": describe_machine(device), "versions": list_versions(), "date": read_date()}


def _name_cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
