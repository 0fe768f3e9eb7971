"""How much memory is free: of this process's computer and container, and of its GPUs.

Reads the machine and decides nothing. A container's limit counts where it is lower than what the
computer has; pages of files in it are not taken for used, since the system takes them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

#: Where Linux mounts the control groups; version 1 has a folder for each kind.
CGROUPS = Path("/sys/fs/cgroup")
#: Version 1 says "no limit" by the largest multiple of a page.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """What is free, in bytes.

    Attributes:
        memory: Of the computer's own memory for this process, with what the process has already.
        gpus: Of each GPU.
        limited_by: "computer" or "container".
        own: What the process has already, in `memory`.
    """

    memory: int
    gpus: tuple[int, ...] = ()
    limited_by: str = "computer"
    own: int = 0


def read_free_memory(*, gpus: int | None = 0) -> FreeMemory:
    """Look at this machine as it is now.

    Args:
        gpus: How many GPUs to look at, in order; None is all. A look takes some hundred MB of one.
    """
    import psutil

    own = int(psutil.Process().memory_info().rss)
    available = int(psutil.virtual_memory().available)
    room = container_room(CGROUPS, _read(Path("/proc/self/cgroup")))
    limited = room is not None and room < available
    return FreeMemory(
        memory=(room if limited and room is not None else available) + own,
        gpus=_free_of_gpus(gpus) if gpus != 0 else (),
        limited_by="container" if limited else "computer",
        own=own,
    )


def _free_of_gpus(count: int | None) -> tuple[int, ...]:
    import torch

    found = torch.cuda.device_count()
    numbers = range(found if count is None else min(count, found))
    return tuple(int(torch.cuda.mem_get_info(number)[0]) for number in numbers)


def container_room(root: Path, membership: str) -> int | None:
    """Return the bytes that a process may still take before its control group's limit.

    Args:
        root: Where the control groups are mounted.
        membership: Content of `/proc/self/cgroup`.

    Returns:
        The smallest room of the group and those that it lies in; None without a limit.
    """
    rooms: list[int] = []
    for line in membership.splitlines():
        _, kinds, path = ([*line.split(":", 2), "", ""])[:3]
        if kinds == "":
            v2 = ("memory.max", "memory.current", "inactive_file", "active_file")
            rooms += _rooms(root, path, *v2)
        elif "memory" in kinds.split(","):
            v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            rooms += _rooms(root / "memory", path, *v1, "total_inactive_file", "total_active_file")
    return min(rooms, default=None)


def _rooms(root: Path, path: str, limit: str, usage: str, *cached: str) -> Iterator[int]:
    """Yield the room in each group from one's own to the root, where there is a limit.

    In a container the own group is often mounted as the root, so paths that are not there are
    passed over.
    """
    inner = PurePosixPath(path.lstrip("/"))
    for group in (inner, *inner.parents):
        folder = root / group
        most, used = _number(_read(folder / limit)), _number(_read(folder / usage))
        if most is None or used is None or most >= _NO_LIMIT:
            continue
        pairs = (line.partition(" ") for line in _read(folder / "memory.stat").splitlines())
        stat = {name: _number(value) or 0 for name, _, value in pairs}
        dropped = sum(stat.get(name, 0) for name in cached)
        yield max(most - used + min(dropped, used), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None
