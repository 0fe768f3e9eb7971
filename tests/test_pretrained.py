"""Published checkpoints through `from qwen import ...`: switches, remote code, damage, saving."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from golden_v1 import CHECKPOINT, assert_parity, golden_ids, load_tiny, tensors
from reference_v1 import CONFIG, random_weights, write_checkpoint
from safetensors.torch import load_file, save_file

import qwen
from qwen import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig
from qwen.configuration_qwen import QWenConfig
from qwen.errors import CheckpointDamaged, CheckpointNotFound, InvalidSetting
from qwen.modeling_qwen import QWenLMHeadModel, QWenModel

#: As Qwen-7B's and Qwen-1.8B-Chat's, both published.
GENERATION_CONFIG = {
    "chat_format": "chatml",
    "do_sample": True,
    "eos_token_id": 1022,
    "pad_token_id": 1022,
    "max_new_tokens": 4,
    "max_window_size": 6144,
    "stop_words_ids": [[1022]],
    "repetition_penalty": 1.1,
    "top_k": 0,
    "top_p": 0.8,
}
BOMB = "raise SystemExit('code of the checkpoint was run')\n"


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny checkpoint as published ones look: no precision, remote code beside it."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, copy)
    change_config(copy, fp32=False, use_flash_attn="auto")
    (copy / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    (copy / "custom_generate").mkdir()
    for name in ("configuration_qwen", "modeling_qwen", "custom_generate/generate"):
        (copy / f"{name}.py").write_text(BOMB)
    return copy


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)


def test_qwen_offers_the_classes_of_transformers():
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig"):
        assert getattr(qwen, name) is getattr(transformers, name)
        assert name in dir(qwen)
    with pytest.raises(AttributeError, match="no attribute 'AutoPilot'"):
        _ = qwen.AutoPilot


def test_importing_qwen_is_light():
    code = "import qwen, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("trust", [True, False, None])
def test_code_of_the_checkpoint_is_never_run(folder, trust):
    options = {} if trust is None else {"trust_remote_code": trust}
    config = AutoConfig.from_pretrained(folder, **options)
    assert type(config) is QWenConfig and config.auto_map
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(model) is QWenLMHeadModel and not model.training
    assert "generate" not in vars(model)
    assert type(AutoModelForCausalLM.from_config(config, **options)) is QWenLMHeadModel
    assert type(AutoModel.from_pretrained(folder, **options)) is QWenModel


def test_code_of_the_checkpoint_is_never_run_through_the_class(folder):
    model = QWenLMHeadModel.from_pretrained(folder, trust_remote_code=True)
    assert "generate" not in vars(model)


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [
        ({}, torch.float32),
        ({"bf16": True}, torch.bfloat16),
        ({"fp16": True}, torch.float16),
        ({"fp32": True}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": "float16", "bf16": True}, torch.float16),
    ],
)
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, QWenLMHeadModel])
def test_precision_is_the_asked_one_else_that_of_the_device(
    folder, monkeypatch, asked, dtype, device_map, loader
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    change_config(folder, torch_dtype="float16")  # of the file, not of the device
    model = loader.from_pretrained(folder, device_map=device_map, trust_remote_code=True, **asked)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert model.device.type == "cpu"
    model.generate(golden_ids(0, 4))


def test_precision_of_the_configuration_is_obeyed(folder):
    change_config(folder, bf16=True)
    assert load(folder).dtype == torch.bfloat16
    assert load(folder, fp32=True).dtype == torch.float32


@pytest.mark.parametrize(
    ("has_bf16", "device_map", "dtype"),
    [
        (True, None, torch.bfloat16),
        (False, "auto", torch.float16),
        (True, "cpu", torch.float32),
        (True, {"": "cpu"}, torch.float32),
    ],
)
def test_precision_on_a_machine_with_a_gpu(monkeypatch, has_bf16, device_map, dtype):
    from qwen.pretrained import _choose_dtype

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    assert _choose_dtype(QWenConfig(), device_map) == dtype


def test_two_precisions_are_refused(folder):
    with pytest.raises(InvalidSetting, match="bf16 and fp16"):
        load(folder, bf16=True, fp16=True)


def test_published_generation_keys_survive(folder, tmp_path):
    config = GenerationConfig.from_pretrained(folder, trust_remote_code=True)
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    for key, value in GENERATION_CONFIG.items():
        assert getattr(config, key) == getattr(model.generation_config, key) == value
        assert saved[key] == value
    assert 1 <= model.generate(golden_ids(0, 4)).shape[1] - 4 <= 4


def test_saved_checkpoint_has_the_published_names_and_keys(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    published = load_file(folder / "model.safetensors")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], published[name]) for name in saved)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    before = json.loads((folder / "config.json").read_text())
    del before["transformers_version"]
    assert before.items() <= config.items()
    with torch.no_grad():
        logits = load(tmp_path / "saved")(golden_ids(0, 32)).logits[0]
    assert_parity(logits, tensors()["a.logits"])


def test_tensors_of_other_names_are_refused(folder):
    change_weights(folder, lambda w: w.update(other=w.pop("transformer.h.1.attn.c_attn.bias")))
    with pytest.raises(CheckpointDamaged, match=r"h\.1\.attn\.c_attn\.bias is not there.* other"):
        load(folder)


def test_tensors_without_a_place_are_refused(folder):
    change_config(folder, num_hidden_layers=2)
    with pytest.raises(CheckpointDamaged, match=r"h\.2\..* more are too many"):
        load(folder)


def test_published_buffers_are_no_damage(folder):
    change_weights(folder, lambda w: w.update({"transformer.rotary_emb.inv_freq": torch.ones(8)}))
    assert "transformer.rotary_emb.inv_freq" not in load(folder).state_dict()


@pytest.mark.parametrize("name", ["transformer.wte.weight", "lm_head.weight"])
def test_another_vocabulary_size_is_refused(folder, name):
    change_weights(folder, lambda w: w.update({name: torch.zeros(1030, 64)}))
    with pytest.raises(CheckpointDamaged, match=rf"{name}.*1030.*1024.*vocab_size .* to 1030"):
        load(folder)


def test_other_shapes_are_refused(folder):
    change_config(folder, intermediate_size=178)
    with pytest.raises(CheckpointDamaged, match=r"mlp\.c_proj\.weight .*\(64, 88\).*\(64, 89\)"):
        load(folder)


@pytest.mark.parametrize("size", [4, 1000, 900_000])
def test_files_cut_short_are_refused(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointDamaged, match="cannot be read"):
        load(folder)


def test_missing_shards_and_a_damaged_list_of_them_are_refused(tmp_path):
    shard, index = "model-00002-of-00002.safetensors", "model.safetensors.index.json"
    for name, content in ((shard, None), (index, "{"), (index, "{}")):
        folder = write_checkpoint(tmp_path, CONFIG, random_weights(CONFIG))
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
        with pytest.raises(CheckpointDamaged, match=r"cannot be read: .* Fetch"):
            load(folder)


@pytest.mark.parametrize("size", [0, 100, -100])
def test_weights_of_torch_are_read_and_refused_when_cut_short(folder, size):
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path)
    (folder / "model.safetensors").unlink()
    assert torch.equal(load(folder).lm_head.weight, load_tiny().lm_head.weight)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointDamaged, match="cannot be read"):
        load(folder)


def test_pickled_code_is_neither_run_nor_recommended(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": print}, protocol=2))
    with pytest.raises(CheckpointDamaged, match="more than tensors") as caught:
        load(folder)
    assert "weights_only" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there_is_not_called_damage(folder):
    with pytest.raises(RuntimeError, match="device"):
        load(folder, device_map={"": 0})


def test_loading_info_is_given_instead_of_a_refusal(folder):
    change_weights(folder, lambda w: w.pop("lm_head.weight"))
    model, info = load(folder, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert isinstance(model, QWenLMHeadModel)


@pytest.mark.parametrize(
    "asked", [{"use_flash_attn": True}, {"attn_implementation": "flash_attention_2"}]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_missing_flash_attention_falls_back_to_sdpa_and_says_why(folder, caplog, asked, dtype):
    with caplog.at_level(logging.WARNING, logger="qwen.pretrained"):
        model = load(folder, dtype=dtype, **asked)
    assert model.config._attn_implementation == "sdpa"
    assert "flash_attention_2 cannot be used, sdpa is used instead" in caplog.text
    assert ("float16 and bfloat16 only" in caplog.text) is (dtype == "float32")


def test_snapshot_download_returns_folders_and_refuses_other_names(tmp_path, monkeypatch):
    from qwen.hub import Snapshot

    asked = []

    def fetch(repository, *, revision, hub):
        asked.append((repository, revision, hub))
        return Snapshot(tmp_path)

    monkeypatch.setattr("qwen.hub.fetch_snapshot", fetch)
    name = "modelscope:qwen/Qwen-7B-Chat"
    assert qwen.snapshot_download(name, revision="v1.0.5") == str(tmp_path)
    assert qwen.snapshot_download("Qwen/Qwen-7B") == str(tmp_path)
    assert asked == [
        ("qwen/Qwen-7B-Chat", "v1.0.5", "modelscope"),
        ("Qwen/Qwen-7B", None, "huggingface"),
    ]
    assert qwen.snapshot_download(str(tmp_path)) == str(tmp_path)
    with pytest.raises(CheckpointNotFound, match="auto is no checkpoint on a hub"):
        qwen.snapshot_download("auto")


def test_code_of_the_tokenizer_is_never_run(folder, monkeypatch):
    from qwen.tokenization_qwen import QWenTokenizer

    (folder / "tokenization_qwen.py").write_text(BOMB)
    files = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "QWenTokenizer", "auto_map": files})
    )
    loaded = object()
    monkeypatch.setattr(QWenTokenizer, "from_pretrained", lambda *args, **kwargs: loaded)
    assert qwen.AutoTokenizer.from_pretrained(folder, trust_remote_code=True) is loaded
    assert qwen.AutoTokenizer.from_pretrained(folder) is loaded
    (folder / "tokenizer_config.json").unlink()  # config.json names the class as well
    assert qwen.AutoTokenizer.from_pretrained(folder, trust_remote_code=True) is loaded
