"""The folder where downloaded and converted weights lie: its place, its locks, its room.

Knows no hub and no file format. Whatever is written there is written beside and renamed into
place, so that what has its final name is whole.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen.backend import ReportProgress, ignore_progress
from qwen.errors import CheckpointError, DiskFull

_MOVE_HINT = "Free some space, or set QWEN_CACHE to a folder on a larger disk and start again."


def cache_folder() -> Path:
    """Return the cache's folder: $QWEN_CACHE, else qwen-webui in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("QWEN_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base).expanduser() if base else Path.home() / ".cache") / "qwen-webui"
    except RuntimeError:
        raise CheckpointError(
            "No home folder is known, so there is no place for the weights. Set QWEN_CACHE to a "
            "folder that can be written to."
        ) from None


def make_folder(folder: Path) -> Path:
    """Make a folder of the cache, or say how to move the cache.

    Raises:
        CheckpointError: The folder cannot be made or written to.
        DiskFull: There is no room even for a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        if is_disk_full(error):
            raise _disk_full(folder) from None
        writable = False
    if not writable:
        raise CheckpointError(
            f"The folder {folder}, where the weights are kept, cannot be written to. Set "
            "QWEN_CACHE to a folder that can."
        )
    return folder


@contextmanager
def locked(target: Path, *, report: ReportProgress = ignore_progress) -> Iterator[None]:
    """Hold the lock of a file or folder of the cache against other processes and threads.

    A process that ends, however it ends, lets its lock go.
    """
    from filelock import FileLock, Timeout

    make_folder(target.parent)
    lock = FileLock(target.with_name(target.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"Waiting for another process that prepares {target.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an exception of Python or of a Rust library means that the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error).lower()
    return "no space left on device" in text or "disk quota exceeded" in text


def require_space(folder: Path, needed: int, *, advice: str = _MOVE_HINT) -> None:
    """Refuse before anything is written when a folder's disk has less room than needed.

    Args:
        folder: A folder that exists.
        needed: Bytes that will be written.
        advice: What the user is told to do; by default, how to move the cache.

    Raises:
        DiskFull: With how much is needed and where.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _disk_full(folder, needed, free, advice=advice)


@contextmanager
def disk_full_explained(folder: Path, needed: int, *, advice: str = _MOVE_HINT) -> Iterator[None]:
    """Turn the system's "no space left" into `DiskFull`; arguments as `require_space`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFull) or not is_disk_full(error):
            raise
        raise _disk_full(folder, needed, advice=advice) from error


def format_bytes(count: int) -> str:
    """Return a number of bytes as people read it."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def _disk_full(
    folder: Path, needed: int = 0, free: int | None = None, *, advice: str = _MOVE_HINT
) -> DiskFull:
    amount = f"{format_bytes(needed)} more are needed" if needed else "More room is needed"
    left = "" if free is None else f" and {format_bytes(free)} are free"
    return DiskFull(f"The disk of {folder} is full: {amount} there{left}. {advice}")
