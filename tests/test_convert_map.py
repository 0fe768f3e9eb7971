"""GPTQ weights from one layout to the other without unpacking them."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_layouts import (
    assert_identical,
    change_weights,
    to_qwen1,
    to_qwen2,
    weights_of,
    write_json,
    write_qwen1,
    write_qwen2,
)

from qwen.errors import CheckpointUnsupported

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}


@pytest.fixture
def qwen1_folder(tmp_path):
    return write_qwen1(tmp_path / "qwen1")


@pytest.fixture
def qwen2_folder(tmp_path):
    return write_qwen2(tmp_path / "qwen2")


def pack_gptq(folder, *, bias=True):
    """Make a checkpoint's linear layers look quantised: random packed numbers, 4 bits."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape):
        limits = torch.iinfo(torch.int32)
        drawn = torch.randint(limits.min, limits.max, shape, generator=generator)
        return drawn.to(torch.int32)

    def pack(weights):
        for name in [name for name in weights if is_linear(name)]:
            outputs, inputs = weights.pop(name).shape
            module = name.removesuffix(".weight")
            weights[f"{module}.qweight"] = integers(inputs // 8, outputs)
            weights[f"{module}.qzeros"] = integers(inputs // 16, outputs // 8)
            weights[f"{module}.scales"] = torch.rand(inputs // 16, outputs).half()
            weights[f"{module}.g_idx"] = torch.arange(inputs, dtype=torch.int32) // 16
            if bias:
                weights.setdefault(f"{module}.bias", torch.zeros(outputs))
        weights.update({name: t.half() for name, t in weights.items() if t.is_floating_point()})

    change_weights(folder, pack)
    write_json(folder / "config.json", quantization_config=GPTQ)


def is_linear(name):
    return ".weight" in name and any(part in name for part in ("attn.", "mlp."))


def unpacked(tensor, dim):
    """The 4-bit numbers of a packed tensor, eight in each integer along a dimension."""
    nibbles = torch.stack([tensor >> shift & 15 for shift in range(0, 32, 4)], dim=dim + 1)
    return nibbles.flatten(dim, dim + 1)


@pytest.mark.parametrize("bias", [True, False])
def test_gptq_weights_come_back_bit_identical(qwen1_folder, bias):
    pack_gptq(qwen1_folder, bias=bias)
    middle = to_qwen2(qwen1_folder)
    for folder in (middle, to_qwen1(middle)):
        assert json.loads((folder / "config.json").read_text())["quantization_config"] == GPTQ
    assert_identical(weights_of(qwen1_folder.with_name("as_qwen1")), weights_of(qwen1_folder))


def test_gptq_projections_are_the_thirds_of_the_fused_one(qwen1_folder):
    pack_gptq(qwen1_folder)
    fused, weights = weights_of(qwen1_folder), weights_of(to_qwen2(qwen1_folder))
    source = "transformer.h.1.attn.c_attn"
    for index, letter in enumerate("qkv"):
        target, part = f"model.layers.1.self_attn.{letter}_proj", slice(64 * index, 64 * index + 64)
        for name, dim in (("qweight", 0), ("qzeros", 1)):
            numbers = unpacked(fused[f"{source}.{name}"], dim)[:, part]
            assert torch.equal(unpacked(weights[f"{target}.{name}"], dim), numbers)
        assert torch.equal(weights[f"{target}.scales"], fused[f"{source}.scales"][:, part])
        assert torch.equal(weights[f"{target}.bias"], fused[f"{source}.bias"][part])
        assert torch.equal(weights[f"{target}.g_idx"], fused[f"{source}.g_idx"])


def test_gptq_heads_are_repeated_packed(qwen2_folder):
    pack_gptq(qwen2_folder)
    grouped, fused = weights_of(qwen2_folder), weights_of(to_qwen1(qwen2_folder))
    for offset, letter in ((64, "k"), (128, "v")):
        for name, dim in (("qweight", 0), ("qzeros", 1)):
            source = grouped[f"model.layers.0.self_attn.{letter}_proj.{name}"]
            heads = unpacked(source, dim).split(16, 1)
            expected = torch.cat([heads[0], heads[0], heads[1], heads[1]], 1)
            target = unpacked(fused[f"transformer.h.0.attn.c_attn.{name}"], dim)
            assert torch.equal(target[:, offset : offset + 64], expected)


def test_settings_of_old_gptq_files_are_found(qwen1_folder):
    pack_gptq(qwen1_folder)
    write_json(qwen1_folder / "config.json", quantization_config=None)
    write_json(qwen1_folder / "quantize_config.json", bits=4, group_size=16)
    config = json.loads((to_qwen2(qwen1_folder) / "config.json").read_text())
    assert config["quantization_config"] == {"bits": 4, "group_size": 16, "quant_method": "gptq"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w["model.layers.0.self_attn.k_proj.g_idx"].add_(1), "desc_act"),
        (lambda w: w["model.layers.1.mlp.up_proj.bias"].add_(1), r"up_proj\.bias is not zero"),
        (lambda w: w.pop("model.layers.0.self_attn.v_proj.g_idx"), "not stored alike"),
        (
            lambda w: w.update(
                {"model.layers.0.self_attn.v_proj.scales": torch.ones(4, 32)}  # float32
            ),
            "not stored alike",
        ),
    ],
)
def test_gptq_weights_that_cannot_be_joined_are_refused(qwen2_folder, change, words):
    pack_gptq(qwen2_folder)
    change_weights(qwen2_folder, change)
    with pytest.raises(CheckpointUnsupported, match=words):
        to_qwen1(qwen2_folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "awq"}, "quantised by 'awq'"),
        ({"bits": 3}, "with 3 bits"),
        ({"dynamic": {"-:mlp": {}}}, "dynamic"),
    ],
)
def test_other_quantisations_are_refused(qwen1_folder, changes, words):
    pack_gptq(qwen1_folder)
    write_json(qwen1_folder / "config.json", quantization_config=GPTQ | changes)
    with pytest.raises(CheckpointUnsupported, match=words):
        to_qwen2(qwen1_folder)
