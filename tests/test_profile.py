"""The speed and memory tables, on a model of a toy size."""

import json
import sys

import pytest

from qwen.evals import profile
from qwen.evals.mixed_text import mixed_parts
from qwen.evals.random_models import SIZES, random_config


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["profile", "--cpu-only", "--rounds", "2", *arguments])
    return profile.main()


@pytest.mark.parametrize("weights", [[], ["--int4"]])
def test_tables_have_speed_and_peak_of_both_contestants(weights, monkeypatch, tmp_path, capsys):
    small = ["--random", "tiny", "--generate", "3", "6", "--encode", "8", *weights]
    files = ["--json", f"{tmp_path}/p.json", "--plot", f"{tmp_path}/p.png"]
    assert run(monkeypatch, *small, "--peer", *files) == 0
    report = json.loads((tmp_path / "p.json").read_text("utf-8"))
    figures = ["generate 3", "generate 6", "peak, generate 6", "encode 8", "peak, encode 8"]
    assert [(row["who"], row["what"]) for row in report["rows"]] == [
        (who, what) for who in ("generate", "ours") for what in figures
    ]
    assert all(row["median"] > 0 for row in report["rows"])
    assert len(report["rows"][0]["samples"]["values"]) == 2
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert f"random tiny, {'int4' if weights else 'dense'}" in capsys.readouterr().out


def test_published_figures_stand_beside_the_lengths_that_they_were_measured_at():
    figures = dict(zip(profile._PUBLISHED_FIGURES, profile.PUBLISHED["7b", "int4"], strict=True))
    assert figures["generate 8192"] == 33.92
    assert figures["peak, encode 2048"] == 8.21


@pytest.mark.parametrize(("size", "parameters"), [("7b", 7.721e9), ("14b", 14.167e9)])
def test_random_sizes_have_as_many_parameters_as_the_published_ones(size, parameters):
    import torch

    from qwen.modeling_qwen import QWenLMHeadModel

    with torch.device("meta"):
        model = QWenLMHeadModel(random_config(size))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    assert size in SIZES


def test_mixed_text_has_english_code_and_chinese():
    parts = mixed_parts()
    assert list(parts) == ["English", "code", "Chinese"]
    assert "def heappush" in parts["code"]
    assert sum("\u4e00" <= letter <= "\u9fff" for letter in parts["Chinese"]) > 600
