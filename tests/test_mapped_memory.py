import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen.mapped_memory import drop_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux is told")


def resident(tensor):
    """Bytes of the mapping around a tensor that the process holds."""
    size, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first, _, rest = line.partition(" ")
            if "-" in first and not first.endswith(":"):
                begin, end = (int(address, 16) for address in first.split("-"))
                inside = begin <= tensor.data_ptr() < end
            elif inside and first == "Rss:":
                size = int(rest.split()[0]) * 1024
    return size


def test_pages_of_a_file_are_given_back_and_read_again(tmp_path):
    save_file({"weight": torch.arange(1 << 20, dtype=torch.int32)}, tmp_path / "x.safetensors")
    weight = load_file(tmp_path / "x.safetensors")["weight"]
    assert int(weight.sum(dtype=torch.int64)) == (1 << 19) * ((1 << 20) - 1)
    before = resident(weight)
    drop_pages(weight)
    assert before >= weight.nbytes
    assert resident(weight) < weight.nbytes / 10
    assert int(weight[-1]) == (1 << 20) - 1


def test_tensor_in_ordinary_memory_is_left_alone():
    weight = torch.ones(1 << 20)
    drop_pages(weight)
    assert weight.eq(1).all()


#: Lets a thread free blocks of 8 MB that lie between small ones; prints what stays of 160 MB.
BLOCKS = """
import sys, threading
from pathlib import Path
import torch
from qwen.mapped_memory import return_large_blocks
if sys.argv[1] == "returned":
    return_large_blocks()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
def run(kept):
    torch.zeros(3 << 20)  # from now on glibc takes such blocks from a heap
    large = []
    for _ in range(20):
        large.append(torch.ones(2 << 20))
        kept.append(torch.ones(1 << 14))
kept, before = [], resident()
worker = threading.Thread(target=run, args=(kept,))
worker.start()
worker.join()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_blocks_that_were_freed_are_given_back():
    def stays(how):
        command = [sys.executable, "-c", BLOCKS, how]
        project = Path(__file__).parent.parent
        return int(subprocess.run(command, cwd=project, capture_output=True, check=True).stdout)

    assert stays("kept") > 100e6  # else there is nothing to mend
    assert stays("returned") < 30e6
