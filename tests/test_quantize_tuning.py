"""A quantised model that is tuned as a whole: nearer to the dense one, and in the same format."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from quantize_case import (
    content_of,
    dequantised,
    linears_of,
    load_dequantised,
    run,
    write_sources,
)
from tiny_layouts import change_weights, logits, weights_of
from transformers import AutoTokenizer

from qwen import quantize_run, quantize_tuning, tuning_run
from qwen.errors import InvalidSetting, OutOfMemory
from qwen.gptq_format import unpack_codes
from qwen.loading import load_folder
from qwen.quantize import main
from qwen.quantize_layout import DenseCheckpoint
from qwen.quantize_tuning import Distillation, TuningOptions, build_student
from qwen.tunable_linear import TunableLinear
from qwen.tuning_text import (
    TuningText,
    build_openings,
    collect_rows,
    mix_rows,
    roomy_cache,
    sample_rows,
)

TOKENS = 4_000
LAYOUTS = ("qwen", "qwen2")


def enlarge(weights):
    """Make matrices so large that logits are not all alike."""
    for name, tensor in weights.items():
        if tensor.dim() == 2:
            weights[name] = tensor * 4


def silent(step, **_):
    pass


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Dense checkpoints of both layouts; only read."""
    folder = write_sources(tmp_path_factory.mktemp("dense"))
    change_weights(folder / "qwen", enlarge)
    return folder


@pytest.fixture(scope="module", autouse=True)
def fast_rates():
    """So few steps need larger ones."""
    with pytest.MonkeyPatch.context() as patch:
        rates = {"scale_rate": 3e-3, "other_rate": 3e-3, "code_rate": 1e-2, "code_margin": 0.02}
        patch.setattr(tuning_run, "TuningOptions", partial(TuningOptions, **rates))
        yield


@pytest.fixture(scope="module")
def rounded(sources, tmp_path_factory):
    """Both checkpoints rounded to nearest."""
    folder = tmp_path_factory.mktemp("rounded")
    for layout in LAYOUTS:
        run(sources / layout, folder / layout, rtn=True)
    return folder


@pytest.fixture(scope="module")
def tuned(sources, tmp_path_factory):
    """The same, tuned."""
    folder = tmp_path_factory.mktemp("tuned")
    for layout in LAYOUTS:
        run(sources / layout, folder / layout, rtn=True, tune_tokens=TOKENS)
    return folder


def divergence(dense, quantised, ids):
    """Mean KL(dense ‖ quantised), from whole models and their logits."""
    exact = logits(load_folder(dense)[0], ids).log_softmax(-1)
    other = logits(load_dequantised(dense, quantised), ids).log_softmax(-1)
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def messages_of(**arguments):
    said = []
    run(report=lambda step, **_: said.append(step), **arguments)
    return said


def build_pair(dense, quantised):
    """Return teacher and student."""
    checkpoint = DenseCheckpoint(dense)
    teacher = checkpoint.build_model(checkpoint.read, dtype=torch.float32, device="cpu")
    read = weights_of(quantised).get
    student = build_student(checkpoint, read, teacher, device="cpu", dtype=torch.float32)
    return checkpoint, teacher, student


def random_text(rows=40, held_out=8, length=48):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 250, (rows + held_out, length), generator=generator)
    return TuningText(ids[:rows], ids[rows:])


def distil(dense, quantised, text=None, **options):
    checkpoint, teacher, student = build_pair(dense, quantised)
    chosen = TuningOptions(**options)
    distillation = Distillation(teacher, student, checkpoint.layout, chosen, checkpoint.read)
    return distillation.run(text or random_text(), silent), student


# What it is good for.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tuned_model_answers_more_like_the_dense_one_on_text_not_seen(
    sources, rounded, tuned, layout
):
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(sources / layout)
    ids = torch.tensor(tokenizer(text)["input_ids"][: 16 * 48]).view(16, 48)
    before = divergence(sources / layout, rounded / layout, ids)
    assert divergence(sources / layout, tuned / layout, ids) < 0.9 * before


def test_codes_that_are_tuned_too_come_nearer(sources, rounded):
    alone, _ = distil(sources / "qwen2", rounded / "qwen2")
    rates = {"code_rate": 1e-2, "code_margin": 0.02}
    both, _ = distil(sources / "qwen2", rounded / "qwen2", codes=True, **rates)
    assert both.after < 0.8 * alone.after < 0.8 * alone.before


def test_divergence_is_that_of_the_whole_models(sources, rounded):
    text = random_text()
    checkpoint, teacher, student = build_pair(sources / "qwen2", rounded / "qwen2")
    distillation = Distillation(
        teacher, student, checkpoint.layout, TuningOptions(), checkpoint.read
    )
    expected = divergence(sources / "qwen2", rounded / "qwen2", text.held_out)
    assert distillation.measure(text.held_out) == pytest.approx(expected, rel=1e-3)


# What is written.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_format_and_codes_stay_and_what_is_tuned_changes(rounded, tuned, layout):
    before, after = weights_of(rounded / layout), weights_of(tuned / layout)
    assert set(before) == set(after)
    changed = set()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape), name
        if not torch.equal(after[name], tensor):
            changed.add(name)
    scales = {f"{name}.scales" for name in linears_of(before)}
    norms = {name for name in before if "norm" in name or ".ln_" in name}
    biases = {name for name in before if name.endswith(".bias")}
    assert scales < changed
    assert biases
    assert changed == scales | norms | biases
    configs = [(folder / layout / "config.json").read_text() for folder in (rounded, tuned)]
    assert configs[0] == configs[1]


def test_codes_change_when_they_are_asked_for(sources, rounded, tmp_path):
    run(sources / "qwen2", tmp_path / "new", rtn=True, tune_tokens=TOKENS, tune_codes=True)
    before, after = weights_of(rounded / "qwen2"), weights_of(tmp_path / "new")
    name = "model.layers.0.mlp.up_proj.qweight"
    steps = unpack_codes(after[name]).int() - unpack_codes(before[name]).int()
    assert 0 < (steps != 0).float().mean() < 0.2
    assert steps.abs().max() <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_our_loader_gives_the_logits_of_the_tuned_model(sources, tuned, layout):
    _, _, student = build_pair(sources / layout, tuned / layout)
    ids = torch.arange(40)[None]
    exact = logits(student, ids)
    same = logits(load_dequantised(sources / layout, tuned / layout), ids)
    # The student reads the dense embedding, the target has it in float16.
    assert (same - exact).norm() < 2e-3 * exact.norm()
    ours = logits(load_folder(tuned / layout)[0], ids).float()
    # Our kernels multiply in bfloat16.
    assert (ours - exact).norm() < 0.02 * exact.norm()


def test_written_values_are_those_that_were_best(sources, rounded):
    tuned, student = distil(sources / "qwen2", rounded / "qwen2")
    assert tuned.after < tuned.before
    name = "model.layers.1.self_attn.q_proj"
    linear = student.get_submodule(name)
    stored = tuning_run.stored_tensors(tuned.values, dtype=torch.float16)
    assert stored[f"{name}.scales"].shape == linear.scales.shape[::-1]
    before = weights_of(rounded / "qwen2")[f"{name}.scales"].float()
    ratio = stored[f"{name}.scales"].float() / before
    assert 0 < (ratio - 1).abs().max() < 0.1
    assert stored["model.norm.weight"].dtype == torch.float16


# When it runs.


def test_neither_rounding_nor_a_cpu_tunes_unasked(sources, tmp_path):
    rounding = messages_of(source=sources / "qwen2", target=tmp_path / "a", rtn=True)
    assert not any("une" in step for step in rounding)
    plain = messages_of(source=sources / "qwen2", target=tmp_path / "b")
    assert [step for step in plain if "une" in step] == [
        "Not tuned: on a CPU that takes hours. --tune-tokens N does it all the same"
    ]
    none = messages_of(source=sources / "qwen2", target=tmp_path / "c", tune_tokens=0)
    assert not any("une" in step for step in none)
    assert content_of(tmp_path / "b") == content_of(tmp_path / "c")


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("cuda:0", {}, tuning_run.GPU_TOKENS),
        ("cuda:0", {"rtn": True}, 0),
        ("cuda:0", {"rtn": True, "tune_tokens": 7}, 7),
        ("cuda:0", {"tune_tokens": 0}, 0),
        ("cpu", {}, 0),
        ("cpu", {"tune_tokens": 7}, 7),
    ],
)
def test_number_of_tokens_is_as_asked_or_the_default_of_the_device(device, options, expected):
    from qwen.quantize_options import QuantizeOptions

    assert tuning_run.tune_tokens(QuantizeOptions(**options), device=device) == expected


def test_fewer_tokens_than_none_are_refused(sources, tmp_path):
    with pytest.raises(InvalidSetting, match="tokens to tune on"):
        run(sources / "qwen2", tmp_path / "new", tune_tokens=-1)


def test_command_takes_the_options_and_shows_the_progress(sources, tmp_path, capsys):
    arguments = [str(sources / "qwen2"), str(tmp_path / "new"), "--rtn", "--group-size", "32"]
    assert main([*arguments, "--tune-tokens", "1000", "--tune-codes", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "KL to the dense model before tuning: 0.0" in printed
    assert "Tuned on 896 of 896 tokens: KL 0.0" in printed
    assert "tokens/s" in printed


# When it goes wrong.


def test_tuning_that_is_cut_short_keeps_the_layers_and_ends_in_the_same_bytes(
    sources, tuned, tmp_path, monkeypatch
):
    class Crash(Exception):
        pass

    def crash(*_, **__):
        raise Crash

    with monkeypatch.context() as broken, pytest.raises(Crash):
        broken.setattr(Distillation, "run", crash)
        run(sources / "qwen2", tmp_path / "new", rtn=True, tune_tokens=TOKENS)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(quantize_run, "round_layer", crash)
    run(sources / "qwen2", tmp_path / "new", rtn=True, tune_tokens=TOKENS)
    assert content_of(tmp_path / "new") == content_of(tuned / "qwen2")


def test_tuning_of_other_options_is_forgotten(sources, rounded, tmp_path, monkeypatch):
    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr("qwen.quantize_files.WorkFolder.assemble", crash)
        run(sources / "qwen2", tmp_path / "new", rtn=True, tune_tokens=TOKENS)
    run(sources / "qwen2", tmp_path / "new", rtn=True, tune_tokens=0)
    assert content_of(tmp_path / "new") == content_of(rounded / "qwen2")


def test_finished_tuning_is_not_repeated(sources, tuned, tmp_path, monkeypatch):
    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr("qwen.quantize_files.WorkFolder.assemble", crash)
        run(sources / "qwen2", tmp_path / "new", rtn=True, tune_tokens=TOKENS)
    monkeypatch.setattr(Distillation, "run", crash)
    run(sources / "qwen2", tmp_path / "new", rtn=True, tune_tokens=TOKENS)
    assert content_of(tmp_path / "new") == content_of(tuned / "qwen2")


def test_tuning_that_leaves_the_numbers_changes_nothing(sources, rounded, tmp_path, monkeypatch):
    monkeypatch.setattr(Distillation, "_step", lambda *_: float("nan"))
    said = messages_of(
        source=sources / "qwen2", target=tmp_path / "new", rtn=True, tune_tokens=TOKENS
    )
    assert any("Warning: The tuning left the range of numbers, so" in step for step in said)
    assert content_of(tmp_path / "new") == content_of(rounded / "qwen2")


def test_tuning_that_breaks_off_keeps_what_was_best(sources, rounded, monkeypatch):
    original, steps = Distillation._step, []

    def step(self, rows, progress):
        steps.append(progress)
        return original(self, rows, progress) if len(steps) < 15 else float("nan")

    monkeypatch.setattr(Distillation, "_step", step)
    tuned, _ = distil(sources / "qwen2", rounded / "qwen2")
    assert len(steps) == 15
    assert tuned.after < tuned.before
    assert tuned.values
    assert "what was best before that is kept" in tuned.problem


def test_tuning_that_makes_it_worse_changes_nothing(sources, rounded):
    tuned, _ = distil(sources / "qwen2", rounded / "qwen2", scale_rate=3.0)
    assert tuned.values == {}
    assert tuned.after == tuned.before
    assert "made nothing better" in tuned.problem or "left the range" in tuned.problem


def test_no_gradient_that_is_not_finite_reaches_the_model(sources, rounded):
    checkpoint, teacher, student = build_pair(sources / "qwen2", rounded / "qwen2")
    distillation = Distillation(
        teacher, student, checkpoint.layout, TuningOptions(), checkpoint.read
    )
    rows = random_text().rows[:2]
    student.base_model.norm.parametrizations.weight.original.data[0] = torch.nan
    before = student.get_submodule("model.layers.0.mlp.up_proj").scales.clone()
    assert distillation._step(rows, 0.5) != distillation._step(rows, 0.5)
    assert torch.equal(student.get_submodule("model.layers.0.mlp.up_proj").scales, before)


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_memory_that_runs_out_says_how_to_finish_without(sources, tmp_path, monkeypatch, device):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(quantize_run.QuantizationRun, "device", device)
    monkeypatch.setattr(tuning_run, "tune", fail)
    options = {"rtn": True, "tune_tokens": TOKENS, "tune_codes": False}
    with pytest.raises(OutOfMemory, match="--tune-tokens 0"):
        run(sources / "qwen2", tmp_path / "new", **options)


# The parts.


@pytest.mark.parametrize("tunes_codes", [False, True])
def test_gradients_are_those_of_plain_operations(tunes_codes):
    generator = torch.Generator().manual_seed(1)
    codes = torch.rand(8, 64, generator=generator) * 19 - 2  # some beyond both ends
    scales = torch.randn(8, 2, generator=generator)
    inputs = torch.randn(5, 64, generator=generator)
    whole = codes.round().clamp(0, 15)
    linear = TunableLinear(whole.to(torch.uint8), scales, None, dtype=torch.float32)
    linear.scales.requires_grad_()
    if tunes_codes:
        del linear.codes
        linear.codes = torch.nn.Parameter(codes.clone())
    linear(inputs).pow(2).sum().backward()
    levels = (whole - 8).requires_grad_()
    plain = scales.clone().requires_grad_()
    weight = levels * plain.repeat_interleave(32, dim=1)
    (inputs @ weight.t()).pow(2).sum().backward()
    torch.testing.assert_close(linear.scales.grad, plain.grad, rtol=1e-4, atol=1e-3)
    if tunes_codes:
        inside = (codes > -0.5) & (codes < 15.5)
        assert not inside.all()
        torch.testing.assert_close(linear.codes.grad, levels.grad * inside, rtol=1e-4, atol=1e-3)


def test_codes_that_are_released_still_mean_the_same(sources, rounded):
    checkpoint, _, student = build_pair(sources / "qwen2", rounded / "qwen2")
    name = "model.layers.0.mlp.down_proj"
    linear, exact = student.get_submodule(name), checkpoint.read(f"{name}.weight")
    before, inputs = linear.codes.clone(), torch.randn(3, 128)
    expected = linear(inputs)
    linear.release_codes(exact, margin=0.2)
    assert torch.equal(linear(inputs), expected)
    away = linear.codes - before
    assert away.abs().max() <= 0.3 + 1e-5
    means = (linear.codes - 8) * linear.scales.repeat_interleave(32, dim=1)
    quantised = dequantised(rounded / "qwen2")[f"{name}.weight"]
    assert (means - exact).abs().mean() < 0.6 * (quantised - exact).abs().mean()


def test_sampled_rows_begin_with_their_openings_and_go_on_as_the_model_would(sources):
    checkpoint = DenseCheckpoint(sources / "qwen2")
    model = checkpoint.build_model(checkpoint.read, dtype=torch.float32, device="cpu")
    model.lm_head.weight *= 1e4  # leaves nothing to chance
    openings = [[5], [7, 8, 9, 10], [11, 12]]
    rows = sample_rows(model, openings, length=12, report=silent)
    assert rows.shape == (3, 12)
    best = logits(model, rows).argmax(-1)
    for row, opening, expected in zip(rows.tolist(), openings, best.tolist(), strict=True):
        assert row[: len(opening)] == opening
        assert row[len(opening) :] == expected[len(opening) - 1 : -1]


def test_sampling_follows_the_model_s_chances(sources):
    checkpoint = DenseCheckpoint(sources / "qwen2")
    model = checkpoint.build_model(checkpoint.read, dtype=torch.float32, device="cpu")
    model.lm_head.weight[:] = 0
    model.lm_head.weight[[3, 4]] = model.model.norm.weight.sign() * 100.0
    hidden = model.model(torch.tensor([[5]]))[0][0, -1]
    model.lm_head.weight[4] += hidden * (torch.tensor(3.0).log() / hidden.pow(2).sum())
    model.lm_head.weight[[3, 4]] += (
        hidden * (50 - model.lm_head.weight[3] @ hidden) / hidden.pow(2).sum()
    )
    rows = sample_rows(model, [[5]] * 400, length=2, report=silent)
    share = (rows[:, 1] == 4).float().mean()
    assert set(rows[:, 1].tolist()) == {3, 4}
    assert share == pytest.approx(0.75, abs=0.08)


def test_some_rows_are_sampled_hotter(sources, monkeypatch):
    checkpoint = DenseCheckpoint(sources / "qwen2")
    model = checkpoint.build_model(checkpoint.read, dtype=torch.float32, device="cpu")
    model.lm_head.weight[:] *= 100
    monkeypatch.setattr("qwen.tuning_text.TEMPERATURES", (1e-3, 1e6))
    rows = sample_rows(model, [[5]] * 60, length=2, report=silent)
    assert len(set(rows[::2, 1].tolist())) == 1
    assert len(set(rows[1::2, 1].tolist())) > 15


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cache_with_room_gives_the_logits_of_the_whole_text(sources, layout):
    checkpoint = DenseCheckpoint(sources / layout)
    model = checkpoint.build_model(checkpoint.read, dtype=torch.float32, device="cpu")
    rows = torch.arange(3 * 9).view(3, 9)
    cache = roomy_cache(model.config, length=9)
    steps = [
        model(input_ids=rows[:, at : at + 1], past_key_values=cache, use_cache=True).logits
        for at in range(9)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, rows), rtol=1e-3, atol=1e-3)
    stores = {store.data_ptr() for layer in cache.layers for store in layer._stores}
    assert {layer.keys.data_ptr() for layer in cache.layers} < stores


def test_rows_are_sampled_the_same_every_time(sources):
    checkpoint = DenseCheckpoint(sources / "qwen")
    model = checkpoint.build_model(checkpoint.read, dtype=torch.float32, device="cpu")
    openings = [[n] for n in range(40)]  # more than are sampled at once
    first, second = (sample_rows(model, openings, length=20, report=silent) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first[:, 1:], first[:1, 1:].expand_as(first[:, 1:]))


def test_openings_are_pieces_of_every_kind_and_single_tokens():
    kinds = [[list(range(n, n + 100)) for n in range(0, 1000, 100)] for _ in range(2)]
    kinds[1] = [[token + 5000 for token in row] for row in kinds[1]]
    openings = build_openings(kinds, [9999], count=300)
    assert len(openings) == 300
    assert sum(opening == [9999] for opening in openings) == 100
    assert sum(5000 <= opening[0] < 9999 for opening in openings) == 100
    pieces = [opening for opening in openings if opening[0] != 9999]
    assert all(piece == list(range(piece[0], piece[0] + len(piece))) for piece in pieces)
    assert {len(piece) for piece in pieces} == set(range(1, 33))


def test_prompts_are_among_the_openings_and_whole():
    prompts = [[7000 + number] * 60 for number in range(20)]
    openings = build_openings([[[1, 2, 3]]], [9999], count=50, prompts=prompts)
    assert len(openings) == 50
    assert [opening for opening in openings if len(opening) == 60] != prompts
    assert sorted(opening for opening in openings if len(opening) == 60) == prompts


def test_openings_are_single_tokens_where_there_is_no_text():
    assert build_openings([[]], [1, 2], count=3) in [
        [[a], [b], [c]] for a in (1, 2) for b in (1, 2) for c in (1, 2)
    ]


def test_held_out_rows_are_not_read_and_most_rows_are_the_model_s_own():
    kinds = [[[kind, number] for number in range(17)] for kind in (1, 2)]
    written = torch.tensor([[0, number] for number in range(110)])
    text = mix_rows(kinds, written, count=120)
    assert text.rows.shape == (120, 2)
    held_out = {tuple(row) for row in text.held_out.tolist()}
    assert {kind for kind, _ in held_out} == {0, 1, 2}
    assert len(held_out) == 24
    assert not held_out & {tuple(row) for row in text.rows.tolist()}
    assert [int((text.rows[:, 0] == kind).sum()) for kind in (0, 1, 2)] == [90, 15, 15]


def test_little_text_is_read_a_few_times_only():
    written = torch.tensor([[0, number] for number in range(400)])
    text = mix_rows([[[1, 0], [1, 1]], []], written, count=300)
    assert len(text.rows) == 300
    assert int((text.rows[:, 0] == 1).sum()) == 8


def test_rows_join_texts_and_leave_out_what_fills_none():
    assert collect_rows([[1, 2, 3], [4, 5], [6, 7]], length=3, most=9) == [[1, 2, 3], [4, 5, 6]]
    assert collect_rows([[1, 2, 3, 4]], length=2, most=1) == [[1, 2]]


def test_user_s_text_is_what_is_tuned_on(sources, tmp_path):
    checkpoint = DenseCheckpoint(sources / "qwen2")
    model = checkpoint.build_model(checkpoint.read, dtype=torch.float32, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(sources / "qwen2")
    file = tmp_path / "mine.txt"
    file.write_text("abcdefgh" * 1000)
    text = tuning_run.build_text(
        model, checkpoint, tokens=4000, tokenizer=tokenizer, file=file, report=silent
    )
    read = [tokenizer.decode(row) for row in text.rows]
    assert sum("abcdefgh" * 10 in row for row in read) >= len(read) // 4
    assert not any("def " in row for row in read)


def test_rate_rises_and_falls():
    rates = [quantize_tuning._rate_at(step / 100) for step in range(100)]
    assert rates[0] < 0.1
    assert max(rates) == pytest.approx(1, abs=0.02)
    assert rates[-1] < 0.05
    assert rates[10:] == sorted(rates[10:], reverse=True)
