"""Perplexity behind long contexts: what is counted, what is switched, what is kept and refused."""

from __future__ import annotations

import json
import math
import sys

import numpy
import pytest
import torch
from golden_v1 import load_tiny
from tiny_checkpoint import write_tiny_folder
from tiny_model import build_tiny_model
from tiny_v1 import SEQ_LENGTH, write_tiny_v1

from qwen.errors import InvalidRequest
from qwen.evals import ntk_policy, perplexity
from qwen.evals.corpus import encode_text, python_manual
from qwen.evals.long_context import (
    ROWS,
    policy_losses,
    switched,
    window_losses,
    window_starts,
)
from qwen.evals.perplexity_report import Cell, render_table
from qwen.loading import load_folder

TEXT = "the quick brown fox jumps over the lazy dog. " * 12
GOLDEN_LENGTH = 64  # on which the golden tiny Qwen v1 was "trained"


@pytest.fixture(scope="module")
def v1_folder(tmp_path_factory):
    return write_tiny_v1(tmp_path_factory.mktemp("v1") / "tiny-v1")


@pytest.fixture(scope="module")
def qwen2_folder(tmp_path_factory):
    return write_tiny_folder(tmp_path_factory.mktemp("qwen2") / "tiny-qwen2")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def random_ids(length, vocabulary=300):
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(1))


def one_shot_losses(model, ids, **options):
    with torch.inference_mode():
        logits = model(ids[None], use_cache=False, **options).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")


def run(folder, *arguments, status=0):
    """Run the command on a tiny checkpoint in float32; return its results."""
    common = ["-c", str(folder), "--cpu-only", "--dtype", "float32"]
    assert perplexity.main([*common, *map(str, arguments)]) == status
    return arguments


def cells(path):
    found = json.loads(path.read_text())["cells"]
    return {(cell["row"], cell["length"]): cell for cell in found}


# What is counted.


@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 500])
def test_chunked_window_scores_as_one_full_forward(chunk):
    model, ids = build_tiny_model(), random_ids(100)
    read = []
    losses = window_losses(model, ids.tolist(), chunk=chunk, on_chunk=read.append)
    torch.testing.assert_close(losses, one_shot_losses(model, ids), atol=1e-4, rtol=1e-4)
    assert read[-1] == 100 and len(read) == -(-100 // chunk)


@pytest.mark.parametrize("row", ROWS)
def test_qwen_v1_window_in_chunks_scores_as_one_full_forward(row):
    model, ids = load_tiny().eval(), random_ids(200)
    with switched(model, ROWS[row]):
        losses = window_losses(model, ids.tolist(), chunk=48)
        torch.testing.assert_close(losses, one_shot_losses(model, ids), atol=1e-3, rtol=1e-4)


def test_logits_are_never_asked_for_more_than_a_chunk():
    model = build_tiny_model()
    rows = []
    model.lm_head.register_forward_hook(lambda module, given, made: rows.append(made.shape[1]))
    window_losses(model, random_ids(100).tolist(), chunk=16)
    assert max(rows) == 16 and sum(rows) == 100


def test_rows_switch_the_model_and_leave_it_as_it_was():
    model, ids = load_tiny().eval(), random_ids(3 * GOLDEN_LENGTH)
    losses = {}
    for name, row in ROWS.items():
        with switched(model, row):
            losses[name] = window_losses(model, ids.tolist())
    assert (model.config.use_dynamic_ntk, model.config.use_logn_attn) == (True, True)
    first = slice(0, GOLDEN_LENGTH - 1)
    torch.testing.assert_close(losses["ntk"][first], losses["ntk-logn"][first])
    assert (losses["plain"][first] - losses["ntk"][first]).abs().max() > 0.1
    assert (losses["ntk"] - losses["ntk-logn"])[GOLDEN_LENGTH:].abs().max() > 0.1
    torch.testing.assert_close(losses["ntk-logn"], one_shot_losses(model, ids), atol=1e-3, rtol=0)


def test_windows_are_spread_over_the_text_without_overlap():
    assert window_starts(100, 10, 4) == [0, 25, 50, 75]
    assert window_starts(100, 30, 4) == [0, 33, 66]
    assert window_starts(10, 10, 4) == [0]
    with pytest.raises(InvalidRequest, match=r"9 tokens.*window of 10"):
        window_starts(9, 10, 1)


def test_perplexity_is_over_all_tokens_but_each_windows_first(v1_folder, text, tmp_path):
    out = tmp_path / "out.json"
    run(v1_folder, "--text", text, "--lengths", 48, "--windows", 3, "--json", out)
    model, tokenizer = load_folder(v1_folder)
    ids = torch.tensor(list(encode_text(tokenizer, TEXT)))
    starts = window_starts(len(ids), 48, 3)
    losses = torch.cat([one_shot_losses(model, ids[start : start + 48]) for start in starts])
    cell = cells(out)["plain", 48]
    assert (cell["windows"], cell["tokens"]) == (3, 3 * 47)
    assert cell["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert cell["curve"] == [cell["perplexity"]]


def test_control_tokens_in_a_text_are_read_as_text(qwen2_folder):
    _, tokenizer = load_folder(qwen2_folder)
    ids = encode_text(tokenizer, "a<|im_end|>b")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
    assert tokenizer.decode(ids) == "a<|im_end|>b"


def test_the_default_text_is_the_same_at_every_run():
    manual = python_manual()
    assert manual == python_manual()
    assert 'The "assert" statement' in manual and len(manual) > 300_000


# The table.


def test_table_has_all_rows_of_a_qwen_v1_and_equal_ones_up_to_its_trained_length(
    v1_folder, text, tmp_path, capsys
):
    out = tmp_path / "out.json"
    lengths = (SEQ_LENGTH, 2 * SEQ_LENGTH)
    run(v1_folder, "--text", text, "--lengths", *lengths, "--json", out)
    found = cells(out)
    assert set(found) == {(row, length) for row in ROWS for length in lengths}
    short = {found[row, lengths[0]]["perplexity"] for row in ROWS}
    long = {found[row, lengths[1]]["perplexity"] for row in ROWS}
    assert (len(short), len(long)) == (1, 3)
    printed = capsys.readouterr().out
    assert "| + dynamic NTK + log-n |" in printed and "| | 64 | 128 |" in printed


def test_qwen2_has_the_plain_row_only(qwen2_folder, text, tmp_path, capsys):
    out = tmp_path / "out.json"
    run(qwen2_folder, "--text", text, "--lengths", 16, "--json", out)
    assert set(cells(out)) == {("plain", 16)}
    run(qwen2_folder, "--text", text, "--lengths", 16, "--rows", "plain", "ntk", status=1)
    error = capsys.readouterr().err
    assert "'qwen2'" in error and "qwen.convert" in error


def test_missing_cell_is_a_dash():
    cell = Cell("plain", 64, 12.345, 1, 63, 0.1)
    table = render_table({("plain", 64): cell}, {"plain": "plain", "ntk": "+ NTK"}, [64, 1024])
    assert table.splitlines()[0] == "| | 64 | 1,024 |"
    assert table.splitlines()[2:] == ["| plain | 12.35 | – |", "| + NTK | – | – |"]


def test_ids_of_both_formats_give_what_their_text_gives(qwen2_folder, text, tmp_path):
    _, tokenizer = load_folder(qwen2_folder)
    ids = list(encode_text(tokenizer, TEXT))
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    numpy.save(tmp_path / "ids.npy", numpy.array(ids, dtype=numpy.int32))
    figures = []
    sources = ("--text", text), ("--ids", tmp_path / "ids.json"), ("--ids", tmp_path / "ids.npy")
    for number, source in enumerate(sources):
        out = tmp_path / f"{number}.json"
        run(qwen2_folder, *source, "--lengths", 32, "--json", out)
        figures.append(cells(out)["plain", 32]["perplexity"])
    assert figures == [figures[0]] * 3


# What is kept.


def test_results_are_gone_on_with_and_not_measured_twice(v1_folder, text, tmp_path, monkeypatch):
    out, common = tmp_path / "out.json", ("--text", text, "--rows", "ntk", "--json")
    run(v1_folder, *common, out, "--lengths", 96)
    first = out.read_text()
    monkeypatch.setattr("qwen.evals.long_context.window_losses", None)  # not to be called
    run(v1_folder, *common, out, "--lengths", 96)
    assert json.loads(out.read_text()) == json.loads(first)


def test_another_number_of_windows_is_measured_anew(v1_folder, text, tmp_path):
    out = tmp_path / "out.json"
    for windows in (1, 2):
        run(v1_folder, "--text", text, "--lengths", 96, "--windows", windows, "--json", out)
        assert {cell["windows"] for cell in cells(out).values()} == {windows}


def test_results_of_another_text_are_not_mixed_in(v1_folder, text, tmp_path, capsys):
    out = tmp_path / "out.json"
    run(v1_folder, "--text", text, "--lengths", 32, "--json", out)
    before = out.read_text()
    text.write_text(TEXT.upper())
    run(v1_folder, "--text", text, "--lengths", 32, "--json", out, status=1)
    assert "another corpus_ids" in capsys.readouterr().err
    assert out.read_text() == before


@pytest.mark.parametrize("content", ["{}", "[1]", "no json", '{"cells": [{}], "settings": {}}'])
def test_file_that_holds_something_else_is_not_overwritten(
    v1_folder, text, tmp_path, capsys, content
):
    out = tmp_path / "out.json"
    out.write_text(content)
    run(v1_folder, "--text", text, "--lengths", 32, "--json", out, status=1)
    assert "no results of this program" in capsys.readouterr().err
    assert out.read_text() == content


def test_ctrl_c_keeps_the_cells_that_are_done(v1_folder, text, tmp_path, monkeypatch, capsys):
    from qwen.evals import long_context

    measured = long_context.window_losses

    def interrupted(model, ids, **options):
        if len(ids) == 100:
            raise KeyboardInterrupt
        return measured(model, ids, **options)

    monkeypatch.setattr(long_context, "window_losses", interrupted)
    out = tmp_path / "out.json"
    run(v1_folder, "--text", text, "--lengths", 50, 100, "--json", out, status=130)
    assert set(cells(out)) == {(row, 50) for row in ROWS}
    assert "| plain |" in capsys.readouterr().out


def test_memory_that_runs_out_is_named(v1_folder, text, monkeypatch, capsys):
    def fail(model, ids, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("qwen.evals.long_context.window_losses", fail)
    run(v1_folder, "--text", text, "--lengths", 50, status=1)
    assert "Lower --chunk" in capsys.readouterr().err


def test_time_limit_ends_a_cell_between_chunks(v1_folder, text, tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(perplexity.time, "monotonic", lambda: next(clock))
    out = tmp_path / "out.json"
    arguments = ("--text", text, "--lengths", 20, 100, "--windows", 1, "--chunk", 4)
    run(v1_folder, *arguments, "--max-seconds", 150, "--json", out, status=3)
    assert {length for _, length in cells(out)} == {20}
    assert "time is up" in capsys.readouterr().out


def test_plot_is_drawn(v1_folder, text, tmp_path):
    plot = tmp_path / "plot.png"
    run(v1_folder, "--text", text, "--lengths", 32, 96, "--windows", 1, "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000


def test_plot_without_matplotlib_says_what_to_install(
    v1_folder, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    run(v1_folder, "--text", text, "--lengths", 32, "--plot", tmp_path / "plot.png", status=1)
    assert "requirements-evals.txt" in capsys.readouterr().err


# What is refused.


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("latin.txt", "café ".encode("latin-1") * 50, "not UTF-8"),
        ("short.txt", b"only a few words", "too few for a window"),
        ("flat.json", b'{"ids": [1]}', "one flat list"),
        ("true.json", b"[1, true, 2]", "one flat list"),
        ("cut.json", b"[1, 2,", "no .json file"),
        ("unknown.json", b"[1, 2, 99999]", "99999"),
        ("cut.npy", b"\x93NUMPY", "no .npy file"),
        ("ids.csv", b"1,2,3", "neither .json"),
    ],
)
def test_text_that_cannot_be_used_is_named(qwen2_folder, tmp_path, capsys, name, content, named):
    path = tmp_path / name
    path.write_bytes(content)
    flag = "--text" if path.suffix == ".txt" else "--ids"
    run(qwen2_folder, flag, path, "--lengths", 64, status=1)
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--text", "--ids"])
def test_missing_file_is_named_before_the_model_is_loaded(tmp_path, capsys, flag):
    run(tmp_path / "no-checkpoint", flag, tmp_path / "nothing.json", status=1)
    assert "nothing.json" in capsys.readouterr().err


def test_checkpoint_that_does_not_load_is_named(tmp_path, text, capsys):
    run(tmp_path, "--text", text, status=1)
    assert "holds no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_place_that_cannot_be_written_to_is_refused_before_an_hour_is_spent(
    tmp_path, text, capsys, flag
):
    run(tmp_path / "no-checkpoint", "--text", text, flag, tmp_path / "no" / "a.png", status=1)
    assert "cannot be written" in capsys.readouterr().err


def test_plot_of_an_unknown_kind_is_refused(tmp_path, text, capsys):
    run(tmp_path / "no-checkpoint", "--text", text, "--plot", tmp_path / "a.docx", status=1)
    assert ".png or .svg" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize(
    "arguments",
    [["--lengths", "0"], ["--lengths", "1"], ["--lengths", "k"], ["--windows", "0"]],
)
def test_number_that_means_nothing_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        perplexity.main(arguments)
    assert stopped.value.code == 2
    assert repr(arguments[1]) in capsys.readouterr().err


def test_k_stands_for_1024():
    assert perplexity.parse_length("8k") == 8192
    assert perplexity.parse_length("100") == 100


# The NTK policies.


def test_policies_agree_until_the_reply_outgrows_the_prompts_alpha():
    model, ids = load_tiny().eval(), random_ids(150)
    published, grow = policy_losses(model, ids.tolist(), prompt_length=50, chunk=16)
    assert published.shape == grow.shape == (100,)
    kept = one_shot_losses(model, ids, prompt_length=50)[49:]
    torch.testing.assert_close(published, kept, atol=1e-3, rtol=0)
    # The token after 65 tokens is the first that is chosen with the new alpha.
    assert torch.equal(published[:15], grow[:15])
    assert (published - grow)[15:].abs().max() > 0.1


def test_grow_scores_each_token_as_a_prompt_of_all_before_it():
    model, ids = load_tiny().eval(), random_ids(150)
    _, grow = policy_losses(model, ids.tolist(), prompt_length=50, chunk=16)
    for length in (51, 64, 65, 66, 100, 128, 129, 149):
        cold = one_shot_losses(model, ids[: length + 1], prompt_length=length)[-1]
        torch.testing.assert_close(grow[length - 50], cold, atol=1e-3, rtol=0)


def test_policy_command_keeps_and_draws_both_lines(v1_folder, text, tmp_path, capsys):
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    arguments = ["-c", str(v1_folder), "--cpu-only", "--dtype", "float32", "--text", str(text)]
    arguments += ["--prompt", "56", "--reply", "40", "--step", "16", "--windows", "2"]
    assert ntk_policy.main([*arguments, "--json", str(out), "--plot", str(plot)]) == 0
    found = json.loads(out.read_text())
    assert found["windows"] == 2 and set(found["perplexity"]) == {"published", "grow"}
    assert {len(figures) for figures in found["perplexity"].values()} == {3}
    assert "| 89 – 96 |" in capsys.readouterr().out
    assert plot.stat().st_size > 10_000


def test_policies_of_a_model_without_ntk_are_refused(qwen2_folder, text, capsys):
    arguments = ["-c", str(qwen2_folder), "--cpu-only", "--text", str(text)]
    assert ntk_policy.main(arguments) == 1
    assert "no dynamic NTK" in capsys.readouterr().err
