"""Quantised checkpoints: their format, their numbers, the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from quantize_case import (
    content_of,
    dequantised,
    linears_of,
    load_dequantised,
    options,
    run,
    write_sources,
)
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_layouts import logits, random_ids, weights_of, write_json, write_qwen2

from qwen import quantize_layers, quantize_run
from qwen.calibration import build_calibration
from qwen.gptq_solver import SolverOptions
from qwen.loading import load_folder
from qwen.quantize import main, quantize_checkpoint
from qwen.quantize_layout import DenseCheckpoint
from qwen.tokenizer import build_chat_format, build_text_tokenizer

#: What the published Qwen-7B-Chat-Int4 says, but for the damping.
PUBLISHED = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
    "quant_method": "gptq",
}
SECRET = "Xylophones of Zanzibar. "


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


# The format.


@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
def test_settings_are_those_of_the_published_checkpoints(made, layout):
    config = json.loads((made / layout / "config.json").read_text())
    expected = PUBLISHED | {"group_size": 32, "damp_percent": options().damp_percent}
    assert config["quantization_config"] == expected
    assert config["torch_dtype"] == "float16"
    older = json.loads((made / layout / "quantize_config.json").read_text())
    assert older | {"quant_method": "gptq"} == expected


@pytest.mark.parametrize(("layout", "count"), [("qwen", 5), ("qwen2", 7)])
def test_every_linear_layer_of_the_blocks_is_packed_and_nothing_else(made, sources, layout, count):
    weights, dense = weights_of(made / layout), weights_of(sources / layout)
    names = linears_of(weights)
    assert len(names) == 2 * count
    packed = {f"{name}.{part}" for name in names for part in ("qweight", "qzeros", "scales")}
    packed |= {f"{name}.g_idx" for name in names}
    assert set(weights) == packed | set(dense) - {f"{name}.weight" for name in names}
    assert all(weights[name].dtype == torch.float16 for name in set(weights) & set(dense))


def test_packed_tensors_have_the_shapes_and_zeros_of_version_1(made):
    weights = weights_of(made / "qwen2")
    name = "model.layers.1.mlp.down_proj"  # 128 inputs, 64 outputs, 4 groups
    shapes = {part: tuple(weights[f"{name}.{part}"].shape) for part in ("qweight", "qzeros")}
    assert shapes == {"qweight": (16, 64), "qzeros": (4, 8)}
    assert weights[f"{name}.scales"].shape == (4, 64)
    assert weights[f"{name}.g_idx"].tolist() == [index // 32 for index in range(128)]
    assert (weights[f"{name}.qzeros"] == 0x77777777).all()  # 8 less 1


def test_tokenizer_and_generation_settings_go_along(made, sources):
    for layout, names in (
        ("qwen", ("qwen.tiktoken", "generation_config.json")),
        ("qwen2", ("tokenizer.json", "generation_config.json")),
    ):
        for name in names:
            expected = (sources / layout / name).read_bytes()
            assert (made / layout / name).read_bytes() == expected


def test_nothing_of_the_work_stays(made):
    assert sorted(path.name for path in made.iterdir()) == ["qwen", "qwen2"]
    assert not any(path.is_dir() for path in (made / "qwen").iterdir())


def test_flags_of_qwen1_say_the_dtype_of_the_target(sources, tmp_path):
    run(sources / "qwen", tmp_path / "new", rtn=True, dtype="bfloat16")
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert (config["bf16"], config["fp16"], config["fp32"]) == (True, False, False)
    weights = weights_of(tmp_path / "new")
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    assert weights["transformer.h.0.mlp.w1.scales"].dtype == torch.float16


def test_tied_head_stays_tied(tmp_path):
    write_qwen2(tmp_path / "tied", intermediate_size=128, tie_word_embeddings=True)
    run(tmp_path / "tied", tmp_path / "new", rtn=True)
    assert "lm_head.weight" not in weights_of(tmp_path / "new")
    load_folder(tmp_path / "new")


def test_large_targets_are_written_in_shards(sources, tmp_path):
    quantize_checkpoint(
        sources / "qwen2", tmp_path / "new", options(rtn=True), max_shard_bytes=60_000
    )
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 2
    load_folder(tmp_path / "new")


def test_text_is_nowhere_in_the_target(sources, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text(SECRET * 200)
    run(sources / "qwen2", tmp_path / "new", calibration=text)
    for name, content in content_of(tmp_path / "new").items():
        assert b"Xylophones" not in content, name
        assert b"mine.txt" not in content, name


# The numbers.


@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
def test_our_loader_gives_the_logits_of_the_dense_model_with_these_weights(made, sources, layout):
    exact = logits(load_dequantised(sources / layout, made / layout), random_ids(40) % 300)
    model, _ = load_folder(made / layout)
    ours = logits(model, random_ids(40) % 300)
    assert ours.shape == exact.shape
    # Our kernels multiply in bfloat16.
    assert (ours.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
def test_calibrated_logits_are_nearer_to_the_dense_ones_than_rounded_ones(
    sources, tmp_path, layout
):
    run(sources / layout, tmp_path / "gptq", samples=48)
    run(sources / layout, tmp_path / "rtn", rtn=True)
    dense, tokenizer = load_folder(sources / layout)
    ids = build_calibration(
        build_text_tokenizer(tokenizer),
        build_chat_format(tokenizer),
        vocabulary=300,
        samples=64,
        sequence_length=48,
    ).ids[48:]
    exact = logits(dense, ids)
    change = {
        name: (logits(load_dequantised(sources / layout, tmp_path / name), ids) - exact).norm()
        for name in ("gptq", "rtn")
    }
    assert change["gptq"] < 0.8 * change["rtn"]


def test_smaller_groups_lose_less(sources, tmp_path):
    dense = weights_of(sources / "qwen2")
    changes = {}
    for size in (32, 64):
        run(sources / "qwen2", tmp_path / str(size), group_size=size, rtn=True)
        weights = dequantised(tmp_path / str(size), group_size=size)
        changes[size] = sum((weights[name] - dense[name]).pow(2).sum() for name in dense)
    assert changes[32] < changes[64]


def test_later_layers_are_solved_for_what_quantised_ones_give(sources, tmp_path, monkeypatch):
    seen = []
    original = quantize_run.quantize_layer

    def watch(block, layout, hidden, arguments, **rest):
        done = original(block, layout, hidden, arguments, **rest)
        seen.append(hidden.clone())
        return done

    monkeypatch.setattr(quantize_run, "quantize_layer", watch)
    text = tmp_path / "mine.txt"
    text.write_text("hello world, " * 100)
    run(sources / "qwen2", tmp_path / "new", calibration=text, samples=2)
    model = load_dequantised(sources / "qwen2", tmp_path / "new")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sources / "qwen2")
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"][:96]).view(2, 48)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[1]
    # The target's biases, embedding and norms are rounded to float16.
    assert (seen[0] - expected).norm() < 2e-3 * expected.norm()


def test_bias_takes_up_what_the_change_has_in_common_for_all_tokens(sources):
    dense = DenseCheckpoint(sources / "qwen2")
    hidden = torch.randn(4, 48, 64, generator=torch.Generator().manual_seed(1)) + 0.5
    block = dense.load_layer(0, device="cpu")
    with torch.no_grad():
        normed = block.input_layernorm(hidden).flatten(0, 1)
        exact = block.self_attn.q_proj(normed)
        options = SolverOptions(group_size=32)
        arguments = dense.arguments(hidden[:1])
        quantize_layers.quantize_layer(
            block, dense.layout, hidden.clone(), arguments, options=options
        )
        change = block.self_attn.q_proj(normed) - exact
    assert change.norm() > 0.01 * exact.norm()
    assert change.mean(0).norm() < 1e-3 * change.norm()


# The command.


def test_command_says_what_it_does(sources, tmp_path, capsys):
    arguments = ["--group-size", "32", "--samples", "6", "--sequence-length", "48"]
    assert main([str(sources / "qwen2"), str(tmp_path / "new"), "--device", "cpu", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "Layer 1 of 2: " in printed
    assert "down_proj" in printed
    assert f"to {tmp_path / 'new'}" in printed


def test_command_ends_with_an_error_and_says_why(sources, tmp_path, capsys):
    assert main([str(sources / "qwen2"), str(tmp_path / "new")]) == 1
    assert "error: " in capsys.readouterr().err


def test_command_that_is_interrupted_says_how_to_go_on(sources, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_run, "round_layer", interrupt)
    assert (
        main([str(sources / "qwen2"), str(tmp_path / "new"), "--rtn", "--group-size", "32"]) == 130
    )
    assert "The same command goes on" in capsys.readouterr().err


# Real weights.


@pytest.fixture(scope="module")
def first_layer(embedded_folder, tmp_path_factory):
    """The embedded model's first layer with the embedding as the head, 0.3 GB."""
    folder = tmp_path_factory.mktemp("real") / "dense"
    folder.mkdir()
    for path in embedded_folder.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    with safe_open(embedded_folder / "model.safetensors", framework="pt") as opened:
        names = [
            name
            for name in opened.keys()  # noqa: SIM118 - it is no mapping
            if name.startswith(("model.layers.0.", "model.embed", "model.norm"))
        ]
        save_file({name: opened.get_tensor(name) for name in names}, folder / "model.safetensors")
    layers = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    write_json(folder / "config.json", **layers, tie_word_embeddings=True)
    return folder


@pytest.mark.integration
def test_real_layer_loses_less_than_by_rounding_on_text_not_seen(first_layer, tmp_path):
    run(first_layer, tmp_path / "gptq", group_size=128, samples=4, sequence_length=512, rounds=1)
    run(first_layer, tmp_path / "rtn", group_size=128, rtn=True)
    dense, tokenizer = load_folder(first_layer)
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    ids = torch.tensor([tokenizer(text)["input_ids"][:512]])
    hidden = {}
    with torch.no_grad():
        exact = dense.model(ids).last_hidden_state
        for name in ("gptq", "rtn"):
            dense.load_state_dict(dequantised(tmp_path / name, group_size=128), strict=False)
            hidden[name] = (dense.model(ids).last_hidden_state - exact).norm()
    assert hidden["gptq"] < 0.75 * hidden["rtn"]  # 0.71
