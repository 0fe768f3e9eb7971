"""The GPTQ format: settings, packing, what packed tensors mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gptq import PUBLISHED, round_weight

from qwen.errors import CheckpointDamaged, CheckpointUnsupported
from qwen.gptq_format import (
    GptqConfig,
    GptqTensors,
    check_layer,
    dequantize,
    pack_codes,
    pack_zeros,
    parse_gptq_config,
    unpack_codes,
    unpack_zeros,
)

BITS = st.sampled_from([4, 8])


def random_codes(rows, columns, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


# Packing


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 20), BITS, st.integers(0, 2**31))
def test_codes_come_back_from_packing(words, outputs, bits, seed):
    codes = random_codes(words * 8, outputs, bits, seed)
    packed = pack_codes(codes, bits=bits)
    assert packed.shape == (words * 8 * bits // 32, outputs)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_codes(packed, bits=bits), codes)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), BITS, st.integers(0, 2**31))
def test_zeros_come_back_from_packing(groups, words, bits, seed):
    zeros = random_codes(groups, words * 8, bits, seed)
    packed = pack_zeros(zeros, bits=bits)
    assert packed.shape == (groups, words * 8 * bits // 32)
    assert torch.equal(unpack_zeros(packed, bits=bits), zeros)


def test_first_code_lies_in_the_lowest_bits():
    codes = torch.arange(8, dtype=torch.uint8).reshape(8, 1)
    assert pack_codes(codes).item() == 0x76543210
    assert pack_codes(codes[:4], bits=8).item() == 0x03020100
    codes[7] = 15  # the sign bit
    assert pack_codes(codes).item() == 0xF6543210 - 2**32


def test_zeros_are_stored_less_one():
    assert pack_zeros(torch.full((1, 8), 8)).item() == 0x77777777
    assert pack_zeros(torch.full((1, 4), 128), bits=8).item() == 0x7F7F7F7F


def meaning(tensors, config):
    """The weights by the definition, one by one."""
    per_word = 32 // config.bits
    top = (1 << config.bits) - 1
    weight = torch.empty(tensors.scales.shape[1], len(tensors.g_idx))
    for i in range(weight.shape[1]):
        for o in range(weight.shape[0]):
            group = int(tensors.g_idx[i])
            code = int(tensors.qweight[i // per_word, o]) >> (i % per_word * config.bits) & top
            stored = int(tensors.qzeros[group, o // per_word])
            zero = (stored >> (o % per_word * config.bits) & top) + 1
            weight[o, i] = float(tensors.scales[group, o]) * (code - zero)
    return weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_packed_tensors_mean_what_the_format_says(bits, sym, group_size):
    config = GptqConfig(bits=bits, group_size=group_size, sym=sym)
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    tensors = round_weight(weight, config)
    check_layer(tensors, config, name="layer")
    assert torch.equal(dequantize(tensors, config), meaning(tensors, config))
    step = tensors.scales.max()  # rounding to nearest errs by half a step, clamping by a whole one
    assert (dequantize(tensors, config) - weight).abs().max() < step * 1.05


def test_last_group_may_be_smaller():
    config = GptqConfig(group_size=64)
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(2))
    tensors = round_weight(weight, config)
    assert tensors.scales.shape == (2, 8)
    check_layer(tensors, config, name="layer")
    assert torch.equal(dequantize(tensors, config), meaning(tensors, config))


# Settings


def test_published_settings_are_read():
    assert parse_gptq_config(PUBLISHED, name="it") == GptqConfig(bits=4, group_size=128, sym=True)


def test_settings_of_old_files_name_no_method():
    old = {"bits": 8, "group_size": -1, "sym": False, "desc_act": False}
    assert parse_gptq_config(old, name="it") == GptqConfig(bits=8, group_size=-1, sym=False)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_written_settings_are_read_back(bits, group_size):
    config = GptqConfig(bits=bits, group_size=group_size, sym=False, quantizes_head=True)
    assert parse_gptq_config(config.to_dict(), name="it") == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"desc_act": True}, "desc_act"),
        ({"group_size": 16}, "groups of 16"),
        ({"group_size": 100}, "groups of 100"),
        ({"group_size": 0}, "groups of 0"),
        ({"bits": 3}, "3 bits"),
        ({"bits": 2}, "2 bits"),
        ({"quant_method": "awq"}, "by awq"),
        ({"quant_method": None, "load_in_4bit": True}, "another method"),
        ({"checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"is_marlin_format": True}, "marlin"),
        ({"format": "gptq_v2"}, "gptq_v2"),
        ({"pack_dtype": "int64"}, "int64"),
    ],
)
def test_variants_that_are_not_run_are_refused_by_name(changes, words):
    with pytest.raises(CheckpointUnsupported, match=words) as caught:
        parse_gptq_config(PUBLISHED | changes, name="My-Int4")
    assert "My-Int4" in str(caught.value)
    assert "Choose" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"bits": "4"}, {"bits": True}, {"group_size": None}, {"sym": 1}, {"desc_act": "no"}],
)
def test_settings_of_another_type_are_damage(changes):
    with pytest.raises(CheckpointDamaged, match=next(iter(changes))):
        parse_gptq_config(PUBLISHED | changes, name="it")


@pytest.mark.parametrize("content", [[], "gptq", 4])
def test_settings_that_are_no_object_are_damage(content):
    with pytest.raises(CheckpointDamaged, match="no JSON object"):
        parse_gptq_config(content, name="it")


# Tensors against settings


@pytest.fixture
def tensors() -> GptqTensors:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    return round_weight(weight, GptqConfig(group_size=32))


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_of_version_2_are_told_by_their_values(bits):
    config = GptqConfig(bits=bits, group_size=32)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    right = round_weight(weight, config)
    stored = torch.full((2, 16), (1 << bits - 1) + 1)  # version 2 stores the zero itself
    with pytest.raises(CheckpointUnsupported, match="version 2"):
        check_layer(replace(right, qzeros=pack_zeros(stored, bits=bits)), config, name="layer")
    check_layer(right, config, name="layer")


def test_inputs_grouped_in_another_order_are_refused(tensors):
    order = tensors.g_idx.flip(0).contiguous()
    with pytest.raises(CheckpointUnsupported, match=r"layer\.g_idx"):
        check_layer(replace(tensors, g_idx=order), GptqConfig(group_size=32), name="layer")
    check_layer(replace(tensors, g_idx=None), GptqConfig(group_size=32), name="layer")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("qzeros", lambda t: t[:1]),
        ("scales", lambda t: t[:, :8]),
        ("g_idx", lambda t: t[:32]),
        ("bias", lambda t: t[:8]),
        ("qweight", lambda t: t.long()),
        ("scales", lambda t: t * float("nan")),
    ],
)
def test_tensors_that_contradict_the_settings_are_damage(tensors, part, change):
    broken = replace(tensors, **{part: change(getattr(tensors, part))})
    with pytest.raises(CheckpointDamaged, match=rf"layer\.{part}"):
        check_layer(broken, GptqConfig(group_size=32), name="layer")


def test_another_group_size_than_the_settings_say_is_damage(tensors):
    with pytest.raises(CheckpointDamaged, match="group_size 64"):
        check_layer(tensors, GptqConfig(group_size=64), name="layer")


DYNAMIC = {
    "-:.*\\.0\\.mlp": {},
    "+:.*down_proj": {"bits": 8, "group_size": 64},
    ".*up_proj": {"group_size": 32},
}


def test_layers_that_differ_are_found_by_their_rules():
    config = parse_gptq_config(PUBLISHED | {"dynamic": DYNAMIC}, name="x")
    assert config.for_layer("model.layers.0.mlp.down_proj") is None  # the first rule counts
    assert config.for_layer("model.layers.1.mlp.down_proj") == GptqConfig(8, 64)
    assert config.for_layer("model.layers.1.mlp.up_proj") == GptqConfig(4, 32)
    assert config.for_layer("model.layers.0.self_attn.q_proj") == GptqConfig(4, 128)
    again = parse_gptq_config(config.to_dict(), name="x")
    assert again == config


@pytest.mark.parametrize("dynamic", [["a"], {"+:(": {}}, {"+:a": 8}, {1: {}}])
def test_rules_that_cannot_be_read_are_damage(dynamic):
    with pytest.raises(CheckpointDamaged, match="dynamic"):
        parse_gptq_config(PUBLISHED | {"dynamic": dynamic}, name="x")


def test_rule_that_asks_for_what_is_not_run_is_refused():
    with pytest.raises(CheckpointUnsupported, match="desc_act"):
        parse_gptq_config(PUBLISHED | {"dynamic": {"+:a": {"desc_act": True}}}, name="x")
