"""A tiny Qwen v1 checkpoint's folder, for loading as a user would: random weights, tiny ranks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rank_files import TINY_VOCAB_SIZE, build_tiny_tokenizer

from qwen.configuration_qwen import QWenConfig
from qwen.modeling_qwen import QWenLMHeadModel

SEQ_LENGTH = 64


def write_tiny_v1(folder: Path, *, chat_format: str = "chatml") -> Path:
    """Write configuration, weights, tokenizer and generation settings of a v1 checkpoint."""
    torch.manual_seed(7)
    config = QWenConfig(
        vocab_size=-(-TINY_VOCAB_SIZE // 64) * 64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        seq_length=SEQ_LENGTH,
        max_position_embeddings=SEQ_LENGTH,
    )
    QWenLMHeadModel(config).save_pretrained(folder)
    build_tiny_tokenizer(folder).save_pretrained(folder)
    settings = {"chat_format": chat_format, "eos_token_id": 151643, "max_window_size": 6144}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder
