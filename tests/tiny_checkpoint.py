"""Tiny random Qwen2 checkpoints for tests, as a Transformers folder and as a GGUF file."""

from __future__ import annotations

from pathlib import Path

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYERS, HIDDEN, HEADS, KV_HEADS, MLP, CONTEXT = 2, 64, 4, 2, 96, 128


def byte_tokens() -> list[str]:
    """The 256 bytes in the byte-level spelling of GPT-2, in the order of their ids."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def write_tiny_folder(folder: Path, *, chat: bool = True, tied: bool = False) -> Path:
    """Write a random Qwen2 model with a byte-level tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    torch.manual_seed(0)
    vocabulary = [*byte_tokens(), *SPECIAL]
    config = Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=len(vocabulary),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        extra_special_tokens=["<|im_start|>"],
    )
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_tiny_gguf(
    path: Path,
    *,
    tied: bool = False,
    architecture: str = "qwen2",
    split: str = "qwen2",
    merge: str = "a b",
) -> Path:
    """Write a random model in the GGUF layout that llama.cpp gives to Qwen2.

    Its tokenizer has one merge, and `split` names how it divides text before merging.
    """
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    vocabulary = [*byte_tokens(), merge.replace(" ", ""), *SPECIAL]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(vocabulary)
    kinds = [gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 3
    writer.add_token_types(kinds)
    writer.add_token_merges([merge])
    writer.add_eos_token_id(len(vocabulary) - 1)
    writer.add_pad_token_id(len(vocabulary) - 3)
    writer.add_bos_token_id(len(vocabulary) - 3)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))

    kv = HIDDEN // HEADS * KV_HEADS
    add("token_embd.weight", len(vocabulary), HIDDEN)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", len(vocabulary), HIDDEN)
    for i in range(LAYERS):
        for name, rows in (("attn_q", HIDDEN), ("attn_k", kv), ("attn_v", kv)):
            add(f"blk.{i}.{name}.weight", rows, HIDDEN)
            add(f"blk.{i}.{name}.bias", rows)
        add(f"blk.{i}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"blk.{i}.attn_norm.weight", HIDDEN)
        add(f"blk.{i}.ffn_norm.weight", HIDDEN)
        add(f"blk.{i}.ffn_gate.weight", MLP, HIDDEN)
        add(f"blk.{i}.ffn_up.weight", MLP, HIDDEN)
        add(f"blk.{i}.ffn_down.weight", HIDDEN, MLP)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
