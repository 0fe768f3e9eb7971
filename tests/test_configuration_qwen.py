"""Published configuration files are read, checked and written back."""

from __future__ import annotations

import json

import pytest
from golden_v1 import CHECKPOINT, GOLDEN

from qwen.configuration_qwen import QWenConfig
from qwen.errors import CheckpointDamaged, InvalidSetting

PUBLISHED = json.loads((GOLDEN / "configs.json").read_text())
OUR_NOTES = {"status", "source", "variant"}
AUGUST_2023 = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "n_positions": "max_position_embeddings",
}


def published(name):
    """A published file's keys; what was not found of it is left out."""
    own = {k: v for k, v in PUBLISHED[name].items() if k not in OUR_NOTES and v is not None}
    return PUBLISHED["common"] | own


def small(**changes):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return QWenConfig(**(sizes | {"intermediate_size": 176} | changes))


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("Qwen-")])
def test_published_file_survives_a_save(name, tmp_path):
    keys = published(name)
    QWenConfig.from_dict(dict(keys)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for key, value in keys.items():
        assert saved[AUGUST_2023.get(key, key)] == value, key


def test_names_of_august_2023_mean_the_later_ones():
    config = QWenConfig.from_dict(published("Qwen-7B-Chat (first release, August 2023)"))
    assert (config.hidden_size, config.num_hidden_layers) == (4096, 32)
    assert (config.num_attention_heads, config.intermediate_size) == (32, 22016)
    assert (config.max_position_embeddings, config.n_embd) == (6144, 4096)
    assert config.seq_length == 2048


def test_unknown_keys_survive_a_save(tmp_path):
    small(my_own={"key": [1]}, padded_vocab_size=7, rope_theta=5).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["my_own"] == {"key": [1]} and saved["padded_vocab_size"] == 7
    assert saved["rope_theta"] == 5 and saved["model_type"] == "qwen"


def test_a_file_without_kv_channels_divides_the_hidden_size():
    assert small().kv_channels == 16


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"kv_channels": 12}, "kv_channels"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"intermediate_size": 175}, "intermediate_size"),
        ({"seq_length": None}, "seq_length"),
        ({"rotary_emb_base": None}, "rotary_emb_base"),
        ({"rotary_emb_base": "10000"}, "rotary_emb_base"),
        ({"rotary_pct": None}, "rotary_pct"),
        ({"rotary_pct": 1.5}, "rotary_pct"),
        ({"bf16": True, "fp16": True}, "bf16"),
    ],
)
def test_contradictions_are_refused_by_name(changes, word):
    with pytest.raises(CheckpointDamaged, match=word):
        small(**changes)


def test_asked_precision_replaces_that_of_the_file():
    config = QWenConfig.from_pretrained(CHECKPOINT, bf16=True)  # the file says fp32
    assert (config.bf16, config.fp32, config.flagged_dtype) == (True, False, "bfloat16")


def test_two_precisions_are_refused():
    with pytest.raises(InvalidSetting, match="bf16 and fp16"):
        QWenConfig.from_pretrained(CHECKPOINT, bf16=True, fp16=True)
