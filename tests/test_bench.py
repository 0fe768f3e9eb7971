"""What `make bench` prints, writes and refuses; the figures themselves are no test."""

import json
import sys

import pytest

from qwen.errors import StartupError
from qwen.evals import bench
from qwen.evals.contestants import LlamaCpp, Reply, running
from qwen.evals.report import Comparison, Samples, write_json, write_plot


def comparison(ours, peer, target, better):
    return Comparison(
        "decode", Samples(ours, "tok/s"), "peer", Samples(peer, "tok/s"), target, better
    )


def test_line_has_medians_spread_ratio_target_and_verdict():
    line = str(comparison((9.0, 10.0, 30.0), (4.0, 5.0, 6.0), 1.0, "higher"))
    expected = "decode: ours 10 tok/s [9–30], peer 5 tok/s [4–6], ratio 2.000, target ≥ 1: met"
    assert line == expected


@pytest.mark.parametrize(
    ("ours", "better", "is_met"),
    [(2.0, "higher", True), (1.9, "higher", False), (2.0, "lower", True), (2.1, "lower", False)],
)
def test_target_is_a_least_or_a_most(ours, better, is_met):
    assert comparison((ours,), (1.0,), 2.0, better).is_met is is_met


def test_report_has_every_value_and_the_machine(tmp_path):
    rows = [comparison((1.0, 3.0), (2.0,), 1.0, "higher")]
    write_json(tmp_path / "b.json", "a machine", rows)
    written = json.loads((tmp_path / "b.json").read_text("utf-8"))
    assert written["machine"] == "a machine"
    assert written["rows"][0]["ours"]["values"] == [1.0, 3.0]
    assert written["rows"][0]["ratio"] == 1.0
    write_plot(tmp_path / "b.png", "a machine", rows)
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_no_two_prompts_of_a_row_begin_alike():
    setup = bench.Setup(None, None, None, range(1000), 5)
    prompts = [tuple(prompt) for prompt in setup.prompts(100)]
    assert len(prompts) == 6
    assert len({prompt[0] for prompt in prompts}) == 6
    assert {len(prompt) for prompt in prompts} == {100}


def test_text_too_short_for_the_prompts_is_an_error():
    setup = bench.Setup(None, None, None, range(104), 5)
    with pytest.raises(ValueError, match="too short"):
        list(setup.prompts(100))


class Echo:
    def __init__(self, argument):
        self.argument = argument

    def reply(self, ids, new_tokens):
        if new_tokens == 0:
            raise RuntimeError("nothing to do")
        return Reply(1.5, float(len(ids)), tuple(ids[:new_tokens]))

    def facts(self):
        return {self.argument: 1.0}


class Broken(Echo):
    def __init__(self, argument):
        raise RuntimeError(f"cannot be made of {argument}")


def test_contestant_answers_from_another_process():
    with running(Echo, "peak") as echo:
        assert echo.reply([7, 8, 9], 2) == Reply(1.5, 3.0, (7, 8))
        assert echo.facts() == {"peak": 1.0}


def test_contestant_that_fails_is_named_with_its_reason():
    with pytest.raises(StartupError) as failed, running(Broken, "sand"):
        pytest.fail("it was made")
    assert str(failed.value).startswith("Broken failed: Traceback")
    assert "cannot be made of sand" in str(failed.value)
    with running(Echo, "x") as echo, pytest.raises(StartupError, match="nothing to do"):
        echo.reply([1], 0)


def test_missing_peer_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(StartupError, match=r"requirements-evals\.txt"):
        LlamaCpp("model.gguf")


@pytest.mark.parametrize(("ratio", "code"), [(1.0, 0), (0.99, 1)])
def test_exit_code_tells_whether_every_target_is_met(ratio, code, monkeypatch, tmp_path, capsys):
    rows = [comparison((2.0,), (1.0,), 1.0, "higher"), comparison((ratio,), (1.0,), 1.0, "higher")]
    monkeypatch.setattr(bench, "_measure", lambda names, rounds: rows)
    arguments = ["bench", "--json", f"{tmp_path}/b.json", "--plot", f"{tmp_path}/b.png"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench.main() == code
    assert capsys.readouterr().out.splitlines()[-2:] == [str(row) for row in rows]


def test_contestant_that_cannot_start_ends_the_bench_with_its_message(monkeypatch, capsys):
    def fail(names, rounds):
        raise StartupError("The peer is missing")

    monkeypatch.setattr(bench, "_measure", fail)
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert bench.main() == 2
    assert "The peer is missing" in capsys.readouterr().err
