"""Gives memory back to the system: pages of a mapped weights file, and large blocks once freed.

The system counts pages that were read as the process's memory until it needs them or the file is
unmapped. Only Linux is told; elsewhere nothing happens. Knows no model.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")

#: Parameters of `mallopt` (malloc.h of glibc), and what they are set to: the bytes from which on a
#: block has pages of its own; free bytes that a heap keeps at its end, so that smaller ones of each
#: step are no new pages; how many heaps threads share.
_MALLOC_SETTINGS = {-3: 2 << 20, -1: 32 << 20, -8: 2}


def return_large_blocks() -> None:
    """Let the C library give large blocks back to the system as soon as they are freed.

    glibc raises the size from which on it does so to that of the largest block that was freed, up
    to 32 MB. Keys and values of a conversation are as large, and come and go on many threads, each
    with a heap of its own: with 32 users the process grew to 4.5 GB, more than twice what it used.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _MALLOC_SETTINGS.items():
            mallopt(parameter, value)


def drop_pages(tensor: Tensor) -> None:
    """Let the system forget a tensor's pages, if they are of a file.

    Nobody may use the tensor any more: what was written to it may be lost, what was not is read
    again from the file. A tensor in ordinary memory is left alone.
    """
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    stop = (tensor.data_ptr() + tensor.nbytes) // page * page
    if start < stop and _is_of_a_file(start, stop):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def _is_of_a_file(start: int, stop: int) -> bool:
    """Tell whether one mapping of a file covers the addresses."""
    try:
        lines = _MAPS.read_text("utf-8").splitlines()
    except OSError:
        return False
    for line in lines:
        addresses, _, _, _, inode, *_ = line.split()
        first, last = (int(address, 16) for address in addresses.split("-"))
        if first <= start and stop <= last:
            return inode != "0"
    return False
