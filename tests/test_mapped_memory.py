import sys

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
