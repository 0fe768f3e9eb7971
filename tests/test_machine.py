"""What a measurement says of its machine."""

from __future__ import annotations

import pytest
import torch

from qwen.evals.machine import describe_machine


@pytest.fixture
def gpus(monkeypatch):
    """Make CUDA show GPUs of these names."""
    names: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    return names


def test_gpu_is_named_beside_the_processor(gpus):
    without = describe_machine("torch").split(" · ")
    gpus.append("NVIDIA H200")
    assert describe_machine("torch").split(" · ") == [*without[:2], "NVIDIA H200", *without[2:]]
    assert without[-1].startswith("torch ")


def test_equal_gpus_are_counted(gpus):
    gpus += ["NVIDIA H200", "NVIDIA L4", "NVIDIA H200"]
    assert " · 2 x NVIDIA H200 · NVIDIA L4 · Python " in describe_machine("torch")


def test_gpus_are_left_out_where_torch_is_not_asked_for(gpus):
    gpus.append("NVIDIA H200")
    assert "NVIDIA" not in describe_machine()
