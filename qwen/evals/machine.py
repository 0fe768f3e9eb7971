"""What a figure was measured on: the machine and the versions that matter."""

from __future__ import annotations

import os
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path


def describe_machine(*packages: str) -> str:
    """Return one line with processor, cores, GPUs, Python and the versions of these packages.

    Args:
        packages: GPUs are looked for where torch is among them.
    """
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor = next((x.split(": ")[1] for x in lines if x.startswith("model name")), processor)
    versions = [f"{name} {version(name)}" for name in packages]
    python = f"Python {platform.python_version()}"
    gpus = _name_gpus() if "torch" in packages else []
    return " · ".join([processor, f"{os.cpu_count()} cores", *gpus, python, *versions])


def _name_gpus() -> list[str]:
    """Name the GPUs that CUDA shows, equal ones once with their number."""
    import torch

    if not torch.cuda.is_available():
        return []
    names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return [name if count == 1 else f"{count} x {name}" for name, count in names.items()]
