"""Run the Qwen chat models: checkpoints, decoding, chat. Imports nothing heavy by itself.

`from qwen import AutoModelForCausalLM, AutoTokenizer, AutoConfig, GenerationConfig` gives the
classes of Transformers with Qwen v1 made known to them, loaded on first use (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
    )

    from qwen.auto import snapshot_download
    from qwen.loading import load_model_on_gpus

__version__ = "0.1.0"

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "GenerationConfig",
    "load_model_on_gpus",
    "snapshot_download",
]


def __getattr__(name: str) -> Any:
    if name == "load_model_on_gpus":
        from qwen.loading import load_model_on_gpus

        return load_model_on_gpus
    if name in __all__:
        from qwen.auto import load_public_name

        return load_public_name(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
