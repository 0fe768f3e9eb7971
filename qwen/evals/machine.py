"""What a figure was measured on: the machine and the versions that matter."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe_machine(*packages: str) -> str:
    """Return one line with processor, cores, Python and the versions of these packages."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor = next((x.split(": ")[1] for x in lines if x.startswith("model name")), processor)
    versions = [f"{name} {version(name)}" for name in packages]
    python = f"Python {platform.python_version()}"
    return " · ".join([processor, f"{os.cpu_count()} cores", python, *versions])
