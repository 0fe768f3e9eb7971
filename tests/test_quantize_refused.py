"""What is not quantised, and what is said then."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from quantize_case import (
    content_of,
    run,
    write_sources,
)
from tiny_layouts import change_weights, write_json, write_qwen2

from qwen import quantize, quantize_files, quantize_layout, quantize_run
from qwen.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointUnsupported,
    DiskFull,
    InvalidRequest,
    InvalidSetting,
    OutOfMemory,
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


def test_quantised_source_is_refused(made, tmp_path):
    with pytest.raises(CheckpointUnsupported, match="quantised already"):
        run(made / "qwen2", tmp_path / "new")


def test_target_that_holds_something_is_refused(sources, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="not empty"):
        run(sources / "qwen2", tmp_path)
    assert content_of(tmp_path) == {"mine.txt": b"mine"}


def test_empty_target_is_filled(sources, tmp_path):
    (tmp_path / "new").mkdir()
    run(sources / "qwen2", tmp_path / "new", rtn=True)
    assert (tmp_path / "new/config.json").is_file()


def test_folder_of_somebody_else_beside_the_target_is_refused(sources, tmp_path):
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part/mine.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="not the work of an earlier"):
        run(sources / "qwen2", tmp_path / "new")
    assert content_of(tmp_path / "new.part") == {"mine.txt": b"mine"}


def test_missing_source_is_refused(tmp_path):
    with pytest.raises(CheckpointNotFound, match="holds no checkpoint"):
        run(tmp_path / "none", tmp_path / "new")


def test_incomplete_source_is_refused(source, tmp_path):
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointDamaged, match=r"model\.safetensors"):
        run(source, tmp_path / "new")


def test_missing_tensor_is_named(source, tmp_path):
    change_weights(source, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointDamaged, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        run(source, tmp_path / "new")


def test_missing_norm_is_named(source, tmp_path):
    change_weights(source, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(CheckpointDamaged, match=r"model\.norm\.weight"):
        run(source, tmp_path / "new")


@pytest.mark.parametrize("rtn", [True, False])
def test_weights_that_are_no_numbers_are_named(source, tmp_path, rtn):
    def spoil(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan

    change_weights(source, spoil)
    with pytest.raises(CheckpointDamaged, match=r"layers\.1\.mlp\.up_proj\.weight holds values"):
        run(source, tmp_path / "new", rtn=rtn)


def test_inputs_that_overflow_are_named(source, tmp_path):
    def spoil(weights):
        weights["model.layers.0.mlp.up_proj.weight"].mul_(1e30)
        weights["model.layers.0.mlp.gate_proj.weight"].mul_(1e30)

    change_weights(source, spoil)
    with pytest.raises(CheckpointDamaged, match="reads values that are no finite"):
        run(source, tmp_path / "new")
    with pytest.raises(CheckpointDamaged, match=r"layers\.0 gives values that are no finite"):
        run(source, tmp_path / "other", max_loss=0.03)


def test_dense_weights_too_large_for_float16_are_named(source, tmp_path):
    change_weights(source, lambda weights: weights["model.norm.weight"].mul_(1e6))
    with pytest.raises(CheckpointDamaged, match=r"model\.norm\.weight .*--dtype bfloat16"):
        run(source, tmp_path / "new", rtn=True)
    run(source, tmp_path / "new", rtn=True, dtype="bfloat16")


def test_weights_too_large_for_a_scale_are_named(source, tmp_path):
    change_weights(source, lambda weights: weights["model.layers.0.mlp.up_proj.weight"].mul_(1e7))
    with pytest.raises(CheckpointUnsupported, match=r"layers\.0\.mlp\.up_proj .*too large"):
        run(source, tmp_path / "new", rtn=True)


def test_group_size_that_does_not_divide_a_width_is_refused_by_name(sources, tmp_path):
    with pytest.raises(InvalidSetting, match=r"q_proj reads 64 inputs.*--group-size 64 or 32"):
        run(sources / "qwen2", tmp_path / "new", group_size=128)


def test_width_that_no_group_size_divides_is_refused(tmp_path):
    write_qwen2(tmp_path / "odd", intermediate_size=88)
    with pytest.raises(InvalidSetting, match="No group size fits"):
        run(tmp_path / "odd", tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"group_size": 16}, "not one of 128, 64, 32"),
        ({"rtn": True, "calibration": Path("x")}, "either --rtn or --calibration"),
        ({"damp_percent": 0.0}, "damping"),
        ({"damp_percent": float("nan")}, "damping"),
        ({"rounds": -1}, "rounds"),
        ({"sequence_length": 10_000}, "longer than the model's context"),
    ],
)
def test_option_outside_its_range_is_refused(sources, tmp_path, change, says):
    with pytest.raises(InvalidSetting, match=says):
        run(sources / "qwen2", tmp_path / "new", **change)
    assert list(tmp_path.iterdir()) == []


def test_other_layout_is_refused_by_name(source, tmp_path):
    write_json(source / "config.json", model_type="gpt2")
    with pytest.raises(CheckpointUnsupported, match=r"model_type is 'gpt2'.*qwen2"):
        run(source, tmp_path / "new")


def test_sliding_window_is_refused(source, tmp_path):
    write_json(source / "config.json", layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(CheckpointUnsupported, match="sliding window"):
        run(source, tmp_path / "new")


def test_disk_without_room_is_refused_before_a_layer_is_made(sources, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    steps = []
    with pytest.raises(DiskFull, match="larger disk"):
        run(sources / "qwen2", tmp_path / "new", report=lambda step, **_: steps.append(step))
    assert not any(step.startswith("Layer") for step in steps)


def test_room_asked_for_is_enough(sources, tmp_path, monkeypatch):
    asked, largest = [], 0
    monkeypatch.setattr(quantize, "require_space", lambda _, needed, **__: asked.append(needed))
    original = quantize_files.WorkFolder.finish

    def measure(self, target):
        nonlocal largest
        largest = sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())
        original(self, target)

    monkeypatch.setattr(quantize_files.WorkFolder, "finish", measure)
    monkeypatch.setattr(quantize_run, "_EXTRA_BYTES", 200_000)  # headers, tokenizer
    run(sources / "qwen2", tmp_path / "new")
    assert 0 < largest <= asked[0] < 3 * largest


@pytest.mark.parametrize(("device", "says"), [("cuda:0", "--device cpu"), ("cpu", "--samples")])
def test_memory_that_runs_out_is_explained(sources, tmp_path, monkeypatch, device, says):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for step in ("embed", "load_layer"):
        monkeypatch.setattr(quantize_layout.DenseCheckpoint, step, fail)
    monkeypatch.setattr(quantize_run, "_choose_device", lambda _: device)
    with pytest.raises(OutOfMemory, match=says):
        run(sources / "qwen2", tmp_path / "new")


def test_limit_that_is_no_number_or_below_0_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        quantize.main(["auto", str(tmp_path / "new"), "--max-loss", "little"])
    assert "'little' is neither a number nor off" in capsys.readouterr().err
    for limit in ("-1", "nan"):
        assert quantize.main(["auto", str(tmp_path / "new"), "--max-loss", limit]) == 1
        assert "must be 0 or more" in capsys.readouterr().err
