"""Sizes from configurations on the meta device, from headers and from GGUF files."""

import json

import pytest
import torch
from golden_v1 import GOLDEN
from tiny_checkpoint import write_tiny_folder, write_tiny_gguf
from tiny_v1 import write_tiny_v1

from qwen.errors import CheckpointDamaged, CheckpointUnsupported
from qwen.gguf_header import read_gguf_header
from qwen.loading import load_folder
from qwen.model_shape import shape_of_config, shape_of_folder, shape_of_gguf

CONFIGS = json.loads((GOLDEN / "configs.json").read_text())
NOT_OF_THE_FILE = ("status", "source", "tokenizer_model_max_length")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}


def published(name):
    own = {k: v for k, v in CONFIGS[name].items() if k not in NOT_OF_THE_FILE and v is not None}
    return CONFIGS["common"] | own


@pytest.mark.parametrize(
    ("name", "parameters", "context"),
    [
        # Parameters: the sum over the published tensors' shapes. Context: seq_length, four times
        # that with dynamic NTK.
        ("Qwen-1.8B (Chat)", 1_836_828_672, 32768),
        ("Qwen-7B (base, late 2023)", 7_721_324_544, 32768),
        ("Qwen-7B-Chat (first release, August 2023)", 7_721_324_544, 8192),
        ("Qwen-14B (Chat)", 14_167_290_880, 8192),
        ("Qwen-72B (base, hub version)", 72_287_920_128, 32768),
    ],
)
def test_published_models_have_their_published_sizes(name, parameters, context):
    shape = shape_of_config(published(name))
    assert (shape.parameters, shape.context_length) == (parameters, context)
    assert shape.embedding == shape.head == shape.vocab_size * shape.hidden_size
    assert shape.head_dim == 128


def test_building_on_the_meta_device_takes_no_memory():
    import psutil

    shape_of_config(QWEN2)
    before = psutil.Process().memory_info().rss
    assert shape_of_config(published("Qwen-72B (base, hub version)")).parameters > 7e10
    assert psutil.Process().memory_info().rss - before < 200e6


def test_shared_heads_and_tied_embeddings_are_seen():
    untied = shape_of_config(QWEN2 | {"tie_word_embeddings": False})
    tied = shape_of_config(QWEN2 | {"tie_word_embeddings": True})
    assert untied.parameters == 630_167_424
    assert tied.parameters == untied.parameters - 151936 * 896
    assert tied.head == 0
    assert (tied.num_heads, tied.num_kv_heads, tied.head_dim) == (14, 2, 64)


@pytest.mark.parametrize("write", [write_tiny_folder, write_tiny_v1])
def test_count_is_that_of_the_loaded_model(tmp_path, write):
    folder = write(tmp_path / "tiny")
    shape = shape_of_folder(folder)
    model, _ = load_folder(folder)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert shape.stored_dtype == "float32"
    assert shape.stored_bytes == (folder / "model.safetensors").stat().st_size


def test_count_of_a_tied_model_is_that_of_the_loaded_one(tmp_path):
    folder = write_tiny_folder(tmp_path / "tied", tied=True)
    model, _ = load_folder(folder)
    count = sum(weight.numel() for weight in model.parameters())
    assert shape_of_folder(folder).parameters == count


def test_mixed_types_have_no_stored_dtype(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_tiny_folder(tmp_path / "tiny")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert shape_of_folder(folder).stored_dtype is None


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_header_tells_the_same_as_the_folder_that_it_becomes(tmp_path, tied):
    from qwen.gguf import convert_gguf, local_gguf

    path = write_tiny_gguf(tmp_path / "tiny.gguf", tied=tied)
    shape = shape_of_gguf(read_gguf_header(path))
    folder = convert_gguf(local_gguf(path), dtype="float32", cache=tmp_path / "cache")
    became = shape_of_folder(folder)
    for name in ("parameters", "embedding", "head", "linear", "head_dim", "num_kv_heads"):
        assert getattr(shape, name) == getattr(became, name), name
    assert shape.context_length == became.context_length


def test_int4_settings_are_read():
    shape = shape_of_config(published("Qwen-7B (base, late 2023)") | {"quantization_config": GPTQ})
    assert (shape.bits, shape.group_size, shape.stored_dtype) == (4, 128, None)


def test_layers_of_8_bits_and_dense_ones_count_as_they_are_run():
    usual = shape_of_config(QWEN2 | {"quantization_config": GPTQ})
    rules = {"-:.*o_proj": {}, "+:.*layers\\.0\\.mlp": {"bits": 8}}
    mixed = shape_of_config(QWEN2 | {"quantization_config": GPTQ | {"dynamic": rules}})
    hidden, mlp = QWEN2["hidden_size"], QWEN2["intermediate_size"]
    dense, wide = QWEN2["num_hidden_layers"] * hidden * hidden, 3 * hidden * mlp
    assert mixed.linear == usual.linear - dense - wide
    assert mixed.other == usual.other + dense + wide
    assert mixed.parameters == usual.parameters
    more = dense * 3 / 2 + wide / 2  # 12 and 4 bits a weight, but for scales and zeros
    assert mixed.stored_bytes - usual.stored_bytes == pytest.approx(more, rel=0.05)


@pytest.mark.parametrize("change", [{"bits": 3}, {"group_size": 0}, {"bits": "4"}])
def test_other_int4_settings_are_refused(change):
    with pytest.raises(CheckpointUnsupported, match="4 or 8 bits"):
        shape_of_config(QWEN2 | {"quantization_config": GPTQ | change})


@pytest.mark.parametrize("kind", ["nobody-knows-this", None, "vit"])
def test_unknown_kind_is_refused_by_name(kind):
    with pytest.raises(CheckpointUnsupported, match=repr(kind)):
        shape_of_config({"model_type": kind})


@pytest.mark.parametrize(
    "change", [{"hidden_size": "wide"}, {"hidden_size": -3}, {"num_attention_heads": 0}]
)
def test_contradicting_sizes_are_called_damaged(change):
    with pytest.raises(CheckpointDamaged):
        shape_of_config(QWEN2 | change)


def test_a_checkpoints_own_code_is_not_asked_for():
    assert shape_of_config(QWEN2 | {"auto_map": {"AutoConfig": "evil.Config"}}).num_layers == 24


def test_damaged_header_names_its_file(tmp_path):
    folder = write_tiny_folder(tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(CheckpointDamaged, match=r"model\.safetensors"):
        shape_of_folder(folder)


def test_gguf_of_no_language_model_is_refused(tmp_path):
    header = read_gguf_header(write_tiny_gguf(tmp_path / "tiny.gguf"))
    other = type(header)(values={"general.architecture": "clip"}, shapes={}, num_weights=0, size=0)
    with pytest.raises(CheckpointUnsupported, match="clip"):
        shape_of_gguf(other)
