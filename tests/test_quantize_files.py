"""A quantisation that is cut short goes on, and ends in the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from quantize_case import (
    content_of,
    run,
    write_sources,
)
from safetensors.torch import load_file
from tiny_layouts import change_weights

from qwen import quantize_files, quantize_run
from qwen.errors import (
    InvalidRequest,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Dense checkpoints of both layouts; only read."""
    return write_sources(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory):
    """Both checkpoints quantised with the same options."""
    folder = tmp_path_factory.mktemp("int4")
    for layout in ("qwen", "qwen2"):
        run(sources / layout, folder / layout)
    return folder


@pytest.fixture
def source(sources, tmp_path):
    return shutil.copytree(sources / "qwen2", tmp_path / "source")


class Crash(Exception):
    """Stands for whatever ends a process."""


def crash_at(monkeypatch, layer):
    """Let the work end when a layer is reached; return how to mend it."""
    original = quantize_run.QuantizationRun._quantize_layer

    def reach(self, index, hidden):
        if index == layer:
            raise Crash
        original(self, index, hidden)

    monkeypatch.setattr(quantize_run.QuantizationRun, "_quantize_layer", reach)
    return lambda: monkeypatch.setattr(quantize_run.QuantizationRun, "_quantize_layer", original)


@pytest.mark.parametrize("layer", [0, 1])
def test_run_that_goes_on_gives_the_same_bytes(made, sources, tmp_path, monkeypatch, layer):
    mend = crash_at(monkeypatch, layer)
    with pytest.raises(Crash):
        run(sources / "qwen2", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    mend()
    steps = []
    run(sources / "qwen2", tmp_path / "new", report=lambda step, **_: steps.append(step))
    assert ("Going on after 1 of 2 layers" in steps) == (layer == 1)
    assert sum(step.startswith("Layer ") for step in steps) == 2 - layer
    assert content_of(tmp_path / "new") == content_of(made / "qwen2")
    assert not (tmp_path / "new.part").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from qwen import quantize_run
from qwen.quantize import main
original = quantize_run.WorkFolder.forget_hidden
def kill(self, *, layer):
    os.kill(os.getpid(), signal.SIGKILL)
quantize_run.WorkFolder.forget_hidden = kill
main(sys.argv[1:])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_process_is_gone_on_from(made, sources, tmp_path):
    arguments = [str(sources / "qwen2"), str(tmp_path / "new"), "--group-size", "32"]
    arguments += ["--samples", "6", "--sequence-length", "48", "--device", "cpu"]
    arguments += ["--max-loss", "off"]
    project = Path(__file__).parent.parent
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], cwd=project, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "new.part").is_dir()
    steps = []
    run(sources / "qwen2", tmp_path / "new", report=lambda step, **_: steps.append(step))
    assert "Going on after 1 of 2 layers" in steps
    assert content_of(tmp_path / "new") == content_of(made / "qwen2")


def test_layer_file_that_was_cut_short_does_not_count(made, sources, tmp_path, monkeypatch):
    original = quantize_files.save_file

    def save(tensors, path):
        original(tensors, path)
        if "layer-00001" in path.name:
            os.truncate(path, 100)
            raise Crash

    monkeypatch.setattr(quantize_files, "save_file", save)
    with pytest.raises(Crash):
        run(sources / "qwen2", tmp_path / "new")
    monkeypatch.setattr(quantize_files, "save_file", original)
    run(sources / "qwen2", tmp_path / "new")
    assert content_of(tmp_path / "new") == content_of(made / "qwen2")


@pytest.mark.parametrize("change", [{"damp_percent": 0.2}, {"samples": 5}, {"group_size": 64}])
def test_changed_option_starts_anew(sources, tmp_path, monkeypatch, change):
    mend = crash_at(monkeypatch, 1)
    with pytest.raises(Crash):
        run(sources / "qwen2", tmp_path / "new")
    mend()
    steps = []
    report = lambda step, **_: steps.append(step)  # noqa: E731
    run(sources / "qwen2", tmp_path / "new", report=report, **change)
    assert "The source or an option is another than before: starting anew" in steps
    run(sources / "qwen2", tmp_path / "straight", **change)
    assert content_of(tmp_path / "new") == content_of(tmp_path / "straight")


def test_changed_source_starts_anew(source, tmp_path, monkeypatch):
    mend = crash_at(monkeypatch, 1)
    with pytest.raises(Crash):
        run(source, tmp_path / "new")
    mend()
    change_weights(source, lambda weights: weights["lm_head.weight"].mul_(2))
    steps = []
    run(source, tmp_path / "new", report=lambda step, **_: steps.append(step))
    assert "The source or an option is another than before: starting anew" in steps


def test_second_process_on_the_same_target_is_refused(sources, tmp_path, monkeypatch):
    original = quantize_run.QuantizationRun._quantize_layer

    def try_again(self, index, hidden):
        with pytest.raises(InvalidRequest, match="Another process"):
            run(sources / "qwen2", tmp_path / "new", rtn=True)
        original(self, index, hidden)

    monkeypatch.setattr(quantize_run.QuantizationRun, "_quantize_layer", try_again)
    run(sources / "qwen2", tmp_path / "new", rtn=True)


def test_hidden_states_of_finished_layers_are_removed(sources, tmp_path, monkeypatch):
    crash_at(monkeypatch, 1)
    with pytest.raises(Crash):
        run(sources / "qwen2", tmp_path / "new")
    kept = sorted(path.name for path in (tmp_path / "new.part/layers").iterdir())
    assert kept == ["00001-hidden.safetensors", "layer-00000.safetensors"]
    hidden = load_file(tmp_path / "new.part/layers/00001-hidden.safetensors")["hidden"]
    assert hidden.shape == (6, 48, 64)
