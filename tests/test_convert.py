"""Qwen v1 ↔ Qwen2 layout: the same numbers, whole files, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from golden_v1 import GOLDEN, golden_ids
from safetensors.torch import load_file, save_file
from tiny_layouts import (
    CONTEXT,
    ENDOFTEXT,
    IM_END,
    IM_START,
    RANKS,
    assert_identical,
    change_weights,
    load_qwen1,
    load_qwen2,
    logits,
    random_ids,
    template_ids,
    to_qwen1,
    to_qwen2,
    weights_of,
    write_json,
    write_qwen1,
    write_qwen2,
)
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config
from transformers import Qwen2ForCausalLM as PlainQwen2

from qwen import AutoModelForCausalLM, convert
from qwen.chat import make_context
from qwen.convert import convert_checkpoint, main
from qwen.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointUnsupported,
    DiskFull,
    InvalidRequest,
)


@pytest.fixture
def qwen1_folder(tmp_path):
    return write_qwen1(tmp_path / "qwen1")


@pytest.fixture
def qwen2_folder(tmp_path):
    return write_qwen2(tmp_path / "qwen2")


# Numbers. A single token is left out: a product of matrix and vector is rounded by the matrix's
# height, so the fused projection of one token differs by 4e-6 from three.


@pytest.mark.parametrize("length", [2, 17, 64])
def test_golden_checkpoint_gives_the_same_numbers_in_plain_qwen2(qwen1_folder, length):
    plain, native = load_qwen2(to_qwen2(qwen1_folder)), load_qwen1(qwen1_folder)
    ids = golden_ids(3, 3 + length)
    assert (logits(plain, ids) - logits(native, ids)).abs().max() == 0.0


@pytest.mark.parametrize("length", [2, 17, CONTEXT])
def test_qwen2_gives_the_same_numbers_as_qwen1(qwen2_folder, length):
    plain, native = load_qwen2(qwen2_folder), load_qwen1(to_qwen1(qwen2_folder))
    ids = random_ids(length, rows=2)
    assert (logits(plain, ids) - logits(native, ids)).abs().max() == 0.0


def test_beyond_the_trained_length_only_qwen1_stretches_and_the_notice_says_so(qwen1_folder):
    done = convert_checkpoint(qwen1_folder, qwen1_folder.with_name("new"), to="qwen2")
    plain, native = load_qwen2(done.folder), load_qwen1(qwen1_folder)
    assert (logits(plain, golden_ids(0, 65)) - logits(native, golden_ids(0, 65))).abs().max() > 1
    assert plain.config.max_position_embeddings == 64
    assert "64 tokens" in done.notices[0]
    assert "NTK" in done.notices[0]


def test_tensors_come_back_bit_identical_from_qwen2(qwen1_folder):
    back = to_qwen1(to_qwen2(qwen1_folder), allow_other_ranks=True)
    assert_identical(weights_of(back), weights_of(qwen1_folder))


def test_each_head_of_keys_and_values_is_repeated_in_place(qwen2_folder):
    back = weights_of(to_qwen2(to_qwen1(qwen2_folder)))
    original = weights_of(qwen2_folder)
    for name, tensor in original.items():
        if "k_proj" in name or "v_proj" in name:
            heads = back[name].unflatten(0, (4, 16))
            assert torch.equal(heads[0::2].flatten(0, 1), tensor), name
            assert torch.equal(heads[1::2].flatten(0, 1), tensor), name
            back[name] = tensor
    assert_identical(back, original)


def test_tied_embedding_becomes_an_output_matrix_of_its_own(tmp_path):
    source = write_qwen2(tmp_path / "tied", tie_word_embeddings=True)
    target = to_qwen1(source)
    weights = weights_of(target)
    assert torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])
    config = json.loads((target / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    ids = random_ids(9)
    assert torch.equal(logits(load_qwen1(target), ids), logits(load_qwen2(source), ids))


def test_stored_head_of_a_tied_model_is_not_what_it_uses(tmp_path):
    source = write_qwen2(tmp_path / "tied", tie_word_embeddings=True)
    change_weights(source, lambda w: w.update({"lm_head.weight": torch.zeros(480, 64)}))
    weights = weights_of(to_qwen1(source))
    assert torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])


def test_absent_biases_become_zero(qwen2_folder):
    change_weights(
        qwen2_folder,
        lambda w: [w.pop(name) for name in list(w) if name.endswith("_proj.bias")],
    )
    weights = weights_of(to_qwen1(qwen2_folder))
    assert not weights["transformer.h.0.attn.c_attn.bias"].any()
    assert weights["transformer.h.0.attn.c_attn.bias"].shape == (192,)


def test_buffers_of_old_files_are_left_out(qwen1_folder):
    buffers = {
        "transformer.rotary_emb.inv_freq": torch.ones(8),
        "transformer.h.0.attn.masked_bias": torch.ones(1),
    }
    change_weights(qwen1_folder, lambda w: w.update(buffers))
    assert len(weights_of(to_qwen2(qwen1_folder))) == 3 + 3 * 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_weights_is_kept(qwen1_folder, dtype):
    change_weights(qwen1_folder, lambda w: w.update({n: t.to(dtype) for n, t in w.items()}))
    target = to_qwen2(qwen1_folder)
    assert {tensor.dtype for tensor in weights_of(target).values()} == {dtype}
    assert PlainQwen2.from_pretrained(target).dtype == dtype
    name = json.loads((target / "config.json").read_text())["torch_dtype"]
    assert f"torch.{name}" == str(dtype)


# Files.


def test_large_checkpoints_are_cut_into_shards(qwen1_folder):
    whole = to_qwen2(qwen1_folder, "whole")
    target = to_qwen2(qwen1_folder, "cut", max_shard_bytes=200_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    assert shards == sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert len(shards) > 4
    expected = weights_of(whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    for shard in shards:
        tensors = load_file(target / shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 200_000
    assert_identical(weights_of(target), expected)
    ids = golden_ids(0, 20)
    assert torch.equal(logits(load_qwen2(target), ids), logits(load_qwen2(whole), ids))


def test_shards_are_read(qwen1_folder):
    cut = to_qwen1(to_qwen2(qwen1_folder, "cut", max_shard_bytes=100_000))
    assert_identical(weights_of(cut), weights_of(qwen1_folder))


def test_weights_may_be_read_by_those_who_may_read_the_rest(qwen1_folder):
    target = to_qwen2(qwen1_folder)
    modes = {path.stat().st_mode & 0o777 for path in target.iterdir()}
    assert len(modes) == 1


def test_licence_goes_along(qwen1_folder):
    (qwen1_folder / "LICENSE").write_text("terms")
    assert (to_qwen2(qwen1_folder) / "LICENSE").read_text() == "terms"


def test_configuration_comes_back(qwen1_folder):
    write_json(qwen1_folder / "config.json", use_dynamic_ntk=False, use_logn_attn=False)
    write_json(qwen1_folder / "config.json", rotary_emb_base=20000, layer_norm_epsilon=1e-5)
    before = json.loads((qwen1_folder / "config.json").read_text())
    middle = to_qwen2(qwen1_folder)
    plain = Qwen2Config.from_pretrained(middle)
    assert plain.rope_parameters["rope_theta"] == 20000
    assert (plain.rms_norm_eps, plain.intermediate_size) == (1e-5, 88)
    assert plain.num_key_value_heads == plain.num_attention_heads == 4
    after = json.loads((to_qwen1(middle) / "config.json").read_text())
    kept = set(before) & set(after) - {"max_position_embeddings", "use_flash_attn", "fp32"}
    assert len(kept) > 18
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert after["max_position_embeddings"] == after["seq_length"] == 64


def test_keys_of_august_2023_are_read(qwen1_folder):
    path = qwen1_folder / "config.json"
    config = json.loads(path.read_text())
    names = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }
    names["intermediate_size"] = "ffn_hidden_size"
    path.write_text(json.dumps({names.get(key, key): value for key, value in config.items()}))
    ids = golden_ids(0, 12)
    assert torch.equal(
        logits(load_qwen2(to_qwen2(qwen1_folder)), ids), logits(load_qwen1(qwen1_folder), ids)
    )


def test_generation_settings_of_a_chat_model(qwen1_folder):
    middle = to_qwen2(qwen1_folder)
    plain = json.loads((middle / "generation_config.json").read_text())
    assert plain == {
        "do_sample": True,
        "top_p": 0.7,
        "eos_token_id": [IM_END, IM_START, ENDOFTEXT],
        "pad_token_id": ENDOFTEXT,
    }
    assert GenerationConfig.from_pretrained(middle).eos_token_id == plain["eos_token_id"]
    assert Qwen2Config.from_pretrained(middle).eos_token_id == IM_END
    assert Qwen2Config.from_pretrained(middle).pad_token_id == ENDOFTEXT
    native = json.loads((to_qwen1(middle) / "generation_config.json").read_text())
    assert native == {
        "max_new_tokens": 512,
        "do_sample": True,
        "top_p": 0.7,
        "eos_token_id": ENDOFTEXT,
        "pad_token_id": ENDOFTEXT,
        "chat_format": "chatml",
        "max_window_size": 48,
        "stop_words_ids": [[IM_END], [IM_START]],
    }


def test_base_models_stay_base_models(qwen1_folder):
    write_json(qwen1_folder / "generation_config.json", chat_format="raw", max_new_tokens=7)
    middle = to_qwen2(qwen1_folder)
    tokenizer = AutoTokenizer.from_pretrained(middle)
    assert tokenizer.chat_template is None
    assert tokenizer.eos_token == "<|endoftext|>"
    assert json.loads((middle / "generation_config.json").read_text())["eos_token_id"] == ENDOFTEXT
    native = json.loads((to_qwen1(middle) / "generation_config.json").read_text())
    assert native["chat_format"] == "raw"
    assert native["stop_words_ids"] == [[ENDOFTEXT]]
    assert native["max_new_tokens"] == 7


# What is refused.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen3"}, "q_norm"),
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        ({"model_type": None}, "model_type"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"head_dim": 32}, "4 heads of 32"),
        ({"num_key_value_heads": 3}, "share 3 heads"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_what_qwen1_cannot_express_is_refused_by_name(qwen2_folder, changes, words):
    write_json(qwen2_folder / "config.json", **changes)
    with pytest.raises(CheckpointUnsupported, match=words):
        to_qwen1(qwen2_folder)
    assert not qwen2_folder.with_name("as_qwen1").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rotary_pct": 0.5}, "rotated"),
        ({"scale_attn_weights": False}, "scaled"),
        ({"no_bias": False}, "biases"),
    ],
)
def test_what_qwen2_cannot_express_is_refused_by_name(qwen1_folder, changes, words):
    write_json(qwen1_folder / "config.json", **changes)
    with pytest.raises(CheckpointUnsupported, match=words):
        to_qwen2(qwen1_folder)


def test_unknown_chat_format_is_refused(qwen1_folder):
    write_json(qwen1_folder / "generation_config.json", chat_format="alpaca")
    with pytest.raises(CheckpointUnsupported, match="alpaca"):
        to_qwen2(qwen1_folder)


def test_the_same_layout_is_refused(qwen1_folder, qwen2_folder):
    with pytest.raises(InvalidRequest, match="Qwen v1 layout already"):
        to_qwen1(qwen1_folder)
    with pytest.raises(InvalidRequest, match="Qwen2 layout already"):
        to_qwen2(qwen2_folder)


NORM = "transformer.h.1.ln_2.weight"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda w: w.pop(NORM), CheckpointDamaged, f"{NORM} is not there"),
        (lambda w: w.pop("lm_head.weight"), CheckpointDamaged, "lm_head"),
        (lambda w: w.update({NORM: torch.ones(63)}), CheckpointDamaged, r"shape \(63,\)"),
        (
            lambda w: w.update({"transformer.h.0.attn.q_norm.weight": torch.ones(16)}),
            CheckpointUnsupported,
            "q_norm",
        ),
        (
            lambda w: w.update({"transformer.h.0.mlp.w1.bias": torch.ones(88)}),
            CheckpointUnsupported,
            r"w1\.bias",
        ),
        (lambda w: w.update({NORM: torch.ones(64).double()}), CheckpointUnsupported, "F64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(qwen1_folder, change, error, words):
    change_weights(qwen1_folder, change)
    with pytest.raises(error, match=words):
        to_qwen2(qwen1_folder)
    assert sorted(path.name for path in qwen1_folder.parent.iterdir()) == ["qwen1"]


def test_target_that_is_not_empty_is_refused(qwen1_folder):
    target = qwen1_folder.with_name("as_qwen2")
    target.mkdir()
    (target / "diary.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="not empty"):
        to_qwen2(qwen1_folder)
    assert (target / "diary.txt").read_text() == "mine"
    (target / "diary.txt").unlink()
    to_qwen2(qwen1_folder)  # an empty folder will do


def test_half_written_target_of_another_run_is_refused(qwen1_folder):
    beside = qwen1_folder.with_name("as_qwen2.part")
    beside.mkdir()
    with pytest.raises(InvalidRequest, match=r"as_qwen2\.part is there"):
        to_qwen2(qwen1_folder)
    assert beside.exists()


def test_full_disk_is_told_before_anything_is_written(qwen1_folder, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DiskFull, match="larger disk") as caught:
        to_qwen2(qwen1_folder)
    assert "QWEN_CACHE" not in str(caught.value)
    assert not qwen1_folder.with_name("as_qwen2.part").exists()


def test_failure_while_writing_leaves_nothing(qwen1_folder, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen.convert_weights.save_file", fail)
    with pytest.raises(DiskFull):
        to_qwen2(qwen1_folder)
    assert sorted(path.name for path in qwen1_folder.parent.iterdir()) == ["qwen1"]


def test_weights_that_read_otherwise_than_written_are_refused(qwen1_folder, monkeypatch):
    def alter(tensors, path, **kwargs):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed["model.norm.weight"][5] += 1e-6
        save_file(changed, path, **kwargs)

    monkeypatch.setattr("qwen.convert_weights.save_file", alter)
    with pytest.raises(CheckpointDamaged, match=r"model\.norm\.weight"):
        to_qwen2(qwen1_folder)


def test_more_tokens_than_rows_are_refused(tmp_path):
    source = write_qwen2(tmp_path / "small", vocab_size=len(RANKS) + 207)
    with pytest.raises(CheckpointUnsupported, match="472 rows"):
        to_qwen1(source)


def test_sources_that_are_no_checkpoints_are_refused(tmp_path, qwen1_folder):
    with pytest.raises(CheckpointNotFound, match="no checkpoint"):
        to_qwen2(tmp_path / "nothing")
    (qwen1_folder / "config.json").write_text('{"model_type": "qwen", "hidden_size": 63}')
    with pytest.raises(CheckpointDamaged, match="kv_channels"):
        to_qwen2(qwen1_folder)
    (qwen1_folder / "qwen.tiktoken").unlink()
    with pytest.raises(CheckpointDamaged, match=r"qwen\.tiktoken"):
        to_qwen2(qwen1_folder)


def test_types_that_are_wrong_in_config_json_are_damage(qwen2_folder):
    write_json(qwen2_folder / "config.json", hidden_size="large")
    with pytest.raises(CheckpointDamaged, match=r"config\.json is damaged"):
        to_qwen1(qwen2_folder)


# The command line.


def test_command_converts_and_says_what_it_does(qwen1_folder):
    command = [sys.executable, "-m", "qwen.convert", "qwen1", "new", "--to", "qwen2"]
    ran = subprocess.run(
        command,
        cwd=qwen1_folder.parent,
        env={"PYTHONPATH": str(convert.__file__).removesuffix("qwen/convert.py")},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = ran.stdout.splitlines()
    assert lines[0] == "Converting the tokenizer"
    assert lines[1].startswith("Writing model.safetensors (")
    assert lines[2].startswith("Note: The Qwen2 layout is good for 64 tokens")
    assert lines[3].startswith("Wrote 39 tensors (")
    assert ran.stderr == ""
    load_qwen2(qwen1_folder.with_name("new"))


def test_command_names_the_error_and_fails(qwen1_folder, tmp_path, capsys):
    target = tmp_path / "new"
    assert main([str(qwen1_folder), str(target), "--to", "qwen1"]) == 1
    assert main([str(tmp_path / "none"), str(target), "--to", "qwen1"]) == 1
    assert main([str(qwen1_folder), str(target), "--to", "qwen2", "--max-shard-size", "0"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in errors] == [True] * 3
    assert "already" in errors[0]
    assert not target.exists()
    assert main([str(qwen1_folder), str(target), "--to", "qwen2", "--max-shard-size", "2e-4"]) == 0
    assert len(list(target.glob("model-*.safetensors"))) > 4


def test_target_is_looked_at_before_anything_is_fetched(tmp_path, capsys, monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError("fetched")

    monkeypatch.setattr(convert, "resolve_checkpoint", fetch)
    (tmp_path / "full").write_text("a file")
    assert main(["Qwen/Qwen-7B-Chat", str(tmp_path / "full"), "--to", "qwen2"]) == 1
    assert "not empty" in capsys.readouterr().err


def test_progress_is_a_line_for_each_step(capsys):
    report = convert._ProgressPrinter()
    for done in range(3):
        report("Fetching", done=done, total=3, unit="bytes")
    report("Writing")
    assert capsys.readouterr().out.splitlines() == ["Fetching", "Writing"]


# The real weights.

REAL = json.loads((GOLDEN / "real_weights_case.json").read_text())
REAL_CHAT = [
    ("system", "You are a helpful assistant."),
    ("user", "Explain what a hash table is in one sentence."),
]


def greedy_ids(model):
    """What a model answers to the recorded prompt, greedily and in float32."""
    ids = torch.tensor([REAL["prompt_ids"]])
    options = {"do_sample": False, "repetition_penalty": 1.0, "temperature": None}
    options |= {"top_p": None, "top_k": None, "max_new_tokens": 60}
    answer = model.generate(ids, eos_token_id=REAL["greedy_ids"][-1], **options)
    return answer[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def real_qwen2_folder(embedded_v1_folder, tmp_path_factory):
    """The real weights there and back; 1.3 GB, removed afterwards."""
    folder = tmp_path_factory.mktemp("real") / "qwen2"
    convert_checkpoint(embedded_v1_folder, folder, to="qwen2")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.integration
def test_real_weights_in_qwen1_layout_answer_as_the_published_code(embedded_v1_folder):
    config = json.loads((embedded_v1_folder / "config.json").read_text())
    recorded = REAL["v1_config"]
    assert config["layer_norm_epsilon"] == pytest.approx(recorded.pop("layer_norm_epsilon"))
    assert {key: config[key] for key in recorded} == recorded
    published = AutoTokenizer.from_pretrained(embedded_v1_folder)
    assert make_context(published, REAL_CHAT[1][1], [], REAL_CHAT[0][1]) == (
        REAL["prompt_text"],
        REAL["prompt_ids"],
    )
    model = load_qwen1(embedded_v1_folder)
    assert type(model).__name__ == "QWenLMHeadModel"
    assert greedy_ids(model) == REAL["greedy_ids"]


@pytest.mark.integration
def test_real_weights_converted_back_answer_the_same_in_plain_transformers(real_qwen2_folder):
    tokenizer = AutoTokenizer.from_pretrained(real_qwen2_folder)
    assert template_ids(tokenizer, REAL_CHAT) == REAL["prompt_ids"]
    model = AutoModelForCausalLM.from_pretrained(real_qwen2_folder, dtype=torch.float32).eval()
    assert type(model) is PlainQwen2
    assert model.config.num_key_value_heads == 14
    assert greedy_ids(model) == REAL["greedy_ids"]
