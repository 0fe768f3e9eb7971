"""Which layers get 8 bits: the estimate against what rounding really does, and the choice."""

from __future__ import annotations

import json
import re

import pytest
import torch
from quantize_case import run, write_sources
from tiny_layouts import change_weights, logits, random_ids, weights_of

from qwen import quantize_run
from qwen.gptq_format import GptqConfig, parse_gptq_config
from qwen.gptq_solver import round_to_nearest
from qwen.loading import load_folder
from qwen.quantize import main
from qwen.quantize_layout import LAYOUTS, DenseCheckpoint
from qwen.quantize_options import QuantizeOptions
from qwen.sensitivity import Part, build_rules, choose_parts, measure_parts

TINY = {"qwen": 1, "qwen2": 3}
SMALL = ["--device", "cpu", "--group-size", "32", "--samples", "6", "--sequence-length", "48"]


def enlarge(weights):
    """Make matrices so large that logits are not all alike."""
    for name, tensor in weights.items():
        if tensor.dim() == 2:
            weights[name] = tensor * 2


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = write_sources(tmp_path_factory.mktemp("dense"))
    for layout in TINY:
        change_weights(folder / layout, enlarge)
    return folder


def silent(step, **_):
    pass


def measured(folder):
    dense = DenseCheckpoint(folder)
    model = dense.build_model(dense.read, dtype=torch.float32, device="cpu")
    ids = random_ids(64, rows=3)
    parts = measure_parts(dense, ids, group_size=32, device="cpu", report=silent)
    return parts, model, ids


@pytest.mark.parametrize("layout", TINY)
def test_estimate_is_what_rounding_a_part_really_costs(sources, layout):
    """But for attention that is all but uniform, in which tokens share their errors."""
    parts, model, ids = measured(sources / layout)
    assert len(parts) == 4 * len(model.get_submodule(LAYOUTS[layout].layers))
    exact = logits(model, ids).log_softmax(-1)
    for part in parts:
        kept = {}
        for name in part.names:
            path = f"{LAYOUTS[layout].layers}.{part.layer}.{name}"
            linear = model.get_submodule(path)
            kept[linear] = linear.weight.data
            linear.weight.data = round_to_nearest(linear.weight, group_size=32).dequantize()
        other = logits(model, ids).log_softmax(-1)
        for linear, weight in kept.items():
            linear.weight.data = weight
        cost = float((exact.exp() * (exact - other)).sum(-1).mean())
        if layout == "qwen2" or "mlp" in part.names[0]:
            assert part.loss == pytest.approx(cost, rel=0.35)


def test_those_that_cost_most_a_weight_are_chosen_until_the_rest_costs_little():
    parts = [
        Part(0, ("a",), size=100, loss=0.02),
        Part(0, ("b",), size=10, loss=0.01),
        Part(1, ("a",), size=100, loss=0.04),
        Part(1, ("b",), size=10, loss=0.0001),
    ]
    assert choose_parts(parts, max_loss=0.0602) == [parts[1]]
    assert choose_parts(parts, max_loss=0.03) == [parts[1], parts[2]]
    assert choose_parts(parts, max_loss=1.0) == []
    assert len(choose_parts(parts, max_loss=0.0)) == 4  # however the sums are rounded


@pytest.mark.parametrize("layout", ["qwen", "llama"])
def test_rules_name_the_chosen_layers_and_no_others(layout):
    names = LAYOUTS[layout]
    chosen = [Part(layer, names.gate_up) for layer in (1, 12)] + [Part(0, (names.mlp_out,))]
    rules = build_rules(names, chosen, group_size=64)
    settings = GptqConfig(group_size=64).to_dict() | {"dynamic": json.loads(json.dumps(rules))}
    config = parse_gptq_config(settings, name="x")
    found = {
        (layer, name)
        for layer in range(24)
        for name in names.linears
        if config.for_layer(f"{names.layers}.{layer}.{name}") == GptqConfig(8, 64)
    }
    expected = {(layer, name) for layer in (1, 12) for name in names.gate_up}
    assert found == expected | {(0, names.mlp_out)}
    assert build_rules(names, [], group_size=64) == {}


def test_with_no_limit_every_layer_has_4_bits_and_nothing_is_estimated(
    sources, tmp_path, monkeypatch
):
    monkeypatch.delattr(quantize_run, "measure_parts")
    target = tmp_path / "it"
    assert main([str(sources / "qwen2"), str(target), *SMALL, "--max-loss", "off"]) == 0
    assert "dynamic" not in (target / "config.json").read_text()
    assert "dynamic" not in (target / "quantize_config.json").read_text()


def test_by_default_8_bits_are_given_where_4_would_cost_more_than_the_limit(
    sources, tmp_path, monkeypatch
):
    limit = QuantizeOptions().max_loss
    assert limit is not None
    asked = []

    def choose(parts, *, max_loss):
        asked.append(max_loss)
        return choose_parts(parts, max_loss=0.0)

    monkeypatch.setattr(quantize_run, "choose_parts", choose)
    assert main([str(sources / "qwen2"), str(tmp_path / "it"), *SMALL]) == 0
    assert asked == [limit]
    assert "dynamic" in (tmp_path / "it" / "config.json").read_text()


@pytest.mark.parametrize("layout", TINY)
def test_checkpoint_of_8_bits_throughout_answers_almost_as_the_dense_one(sources, tmp_path, layout):
    run(sources / layout, tmp_path / "four")
    run(sources / layout, tmp_path / "eight", max_loss=0.0)
    ids = random_ids(64, rows=3)
    exact = logits(load_folder(sources / layout)[0], ids)
    four, eight = (
        float((logits(load_folder(tmp_path / name)[0], ids) - exact).square().mean())
        for name in ("four", "eight")
    )
    assert eight < four / 50
    settings = json.loads((tmp_path / "eight" / "quantize_config.json").read_text())
    assert settings["bits"] == 4
    assert settings["dynamic"]
    settings = json.loads((tmp_path / "four" / "quantize_config.json").read_text())
    assert "dynamic" not in settings


def test_part_of_the_layers_gets_8_bits_and_the_command_says_how_many(sources, tmp_path):
    parts, *_ = measured(sources / "qwen2")
    half = sum(part.loss for part in parts) / 2
    said = []
    run(
        sources / "qwen2",
        tmp_path / "some",
        max_loss=half,
        report=lambda step, **_: said.append(step),
    )
    share = next(re.search(r"(\d+)% of their weights get 8 bits", s) for s in said if "nats" in s)
    assert 0 < int(share[1]) < 100
    weights = weights_of(tmp_path / "some")
    bits = {
        4 * weights[name].numel() * 8 // (weights[name.replace("qweight", "g_idx")].numel() * n)
        for name in weights
        if name.endswith("qweight")
        for n in [weights[name].shape[1]]
    }
    assert bits == {4, 8}
    load_folder(tmp_path / "some")


def test_run_that_goes_on_keeps_its_choice(sources, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantize_run, "quantize_layer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(sources / "qwen2", tmp_path / "it", max_loss=0.0)
    monkeypatch.setattr(quantize_run, "measure_parts", interrupt)
    run(sources / "qwen2", tmp_path / "it", max_loss=0.0)
    assert "dynamic" in (tmp_path / "it" / "config.json").read_text()


def test_tuning_leaves_layers_of_8_bits_alone(sources, tmp_path):
    parts, *_ = measured(sources / "qwen2")
    half = sum(part.loss for part in parts) / 2
    run(sources / "qwen2", tmp_path / "plain", max_loss=half)
    run(sources / "qwen2", tmp_path / "tuned", max_loss=half, tune_tokens=4_000)
    before, after = weights_of(tmp_path / "plain"), weights_of(tmp_path / "tuned")
    widths = {
        name: before[name.replace("scales", "g_idx")].numel()
        for name in before
        if name.endswith("scales")
    }
    eight = {
        name
        for name, width in widths.items()
        if len(before[name.replace("scales", "qweight")]) * 4 == width
    }
    changed = {name for name in widths if not torch.equal(before[name], after[name])}
    assert eight
    assert changed
    assert not changed & eight
