"""The classes of Transformers and the hub that a script imports, with Qwen v1 made known to them.

`from qwen import AutoModelForCausalLM` gives Transformers' own class. Because ours are registered
from outside Transformers, they win over a checkpoint's own files (`auto_map`) even with
`trust_remote_code=True`, so those are never imported.
"""

from __future__ import annotations

import functools
from typing import Any

from qwen.errors import CheckpointNotFound

#: What `qwen` offers on first use.
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
OTHERS = ("GenerationConfig", "snapshot_download")


def load_public_name(name: str) -> Any:
    """Import one of the public names and register Qwen v1 on the way.

    Raises:
        AttributeError: There is no such name.
    """
    if name == "snapshot_download":
        return snapshot_download
    if name not in AUTO_CLASSES + OTHERS:
        raise AttributeError(f"module 'qwen' has no attribute {name!r}")
    import transformers

    if name in AUTO_CLASSES:
        register_qwen()
    return getattr(transformers, name)


@functools.cache
def register_qwen() -> None:
    """Make Qwen v1 and GPTQ known to Transformers' auto classes. Thread-safe: may be repeated."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto import tokenization_auto

    from qwen.configuration_qwen import QWenConfig
    from qwen.gptq_loading import register_gptq
    from qwen.modeling_qwen import QWenLMHeadModel, QWenModel
    from qwen.tokenization_qwen import QWenTokenizer

    AutoConfig.register(QWenConfig.model_type, QWenConfig, exist_ok=True)
    AutoModel.register(QWenConfig, QWenModel, exist_ok=True)
    AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)
    # Not AutoTokenizer.register(QWenConfig, ...): a tokenizer found through its configuration
    # loses against the checkpoint's own code, one found by its name (tokenizer_class) wins.
    tokenization_auto.REGISTERED_TOKENIZER_CLASSES[QWenTokenizer.__name__] = QWenTokenizer
    register_gptq()


def snapshot_download(model_id: str, revision: str | None = None) -> str:
    """Fetch a checkpoint from its hub, or find it in the hub client's cache.

    Args:
        model_id: OWNER/NAME on Hugging Face, modelscope:OWNER/NAME, or a folder.
        revision: Branch, tag or commit; by default the hub's.

    Returns:
        The folder with its files.

    Raises:
        CheckpointError: It cannot be had; the message says why and what to do.
    """
    from qwen.checkpoint import parse_checkpoint
    from qwen.hub import fetch_snapshot

    name = parse_checkpoint(f"{model_id}@{revision}" if revision else model_id)
    if name.kind == "folder":
        return name.value
    if name.kind not in ("huggingface", "modelscope"):
        raise CheckpointNotFound(
            f"{model_id} is no checkpoint on a hub. Name OWNER/NAME or modelscope:OWNER/NAME."
        )
    return str(fetch_snapshot(name.value, revision=name.revision, hub=name.kind).folder)
