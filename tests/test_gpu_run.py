import json
import math
import sys

import pytest

from qwen.evals import gpu_run
from qwen.evals.gpu_checks import Check


def run(monkeypatch, tmp_path, *arguments):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["gpu_run", "--dry", "--json", str(path), *arguments])
    return gpu_run.main(), json.loads(path.read_text())["rows"]


def test_dry_run_gives_every_row_of_a_section(monkeypatch, tmp_path):
    code, rows = run(monkeypatch, tmp_path, "--sections", "correctness", "users")
    assert code == 0
    assert {row["section"] for row in rows} == {"correctness", "users"}
    assert all(row["is_right"] for row in rows if row["section"] == "correctness")
    assert [row["of one user"] > 0 for row in rows if row["section"] == "users"] == [True, True]


def test_wrong_check_ends_with_exit_code_1(monkeypatch, tmp_path):
    wrong = [Check("fine", 0.0, 0.1), Check("wrong", 0.2, 0.1)]
    monkeypatch.setattr(gpu_run, "run_checks", lambda golden, device: iter(wrong))
    code, rows = run(monkeypatch, tmp_path, "--sections", "correctness")
    assert (code, [row["is_right"] for row in rows]) == (1, [True, False])


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_error_that_is_no_number_is_wrong(error):
    assert not Check("x", error, 1.0).is_right


def test_real_run_without_a_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_run"])
    assert gpu_run.main() == 2
    assert "--dry" in capsys.readouterr().err
