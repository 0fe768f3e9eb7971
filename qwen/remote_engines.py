"""What is known of the engines that speak the OpenAI API, and what their model list says.

Pure functions over JSON. Sources: the documents of vLLM 0.23, SGLang 0.5 and llama.cpp's server of
2026; what another server takes beyond the OpenAI API is not known and not sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen.errors import EngineFailed, EngineRefused


@dataclass(frozen=True, slots=True)
class EngineKind:
    """What an engine takes beyond the OpenAI API.

    Attributes:
        name: As a user knows it; empty for one that is not known.
        penalty: Its word for `repetition_penalty`; empty when it has none.
        no_top_k: What it takes for "no limit"; None when it takes no `top_k`.
        continuing: What to send for a last message of the assistant to be continued; None when
            that is not possible.
        tokenize: The field of `/tokenize` that takes a text; empty when there is no such address.
    """

    name: str = ""
    penalty: str = ""
    no_top_k: int | None = None
    continuing: Mapping[str, Any] | None = None
    tokenize: Literal["", "prompt", "content"] = ""


UNKNOWN = EngineKind()
_VLLM_CONTINUING = {"continue_final_message": True, "add_generation_prompt": False}
#: By what the model list says in `owned_by`.
KINDS: dict[str, EngineKind] = {
    "vllm": EngineKind("vLLM", "repetition_penalty", -1, _VLLM_CONTINUING, "prompt"),
    "sglang": EngineKind(
        "SGLang", "repetition_penalty", -1, {"continue_final_message": True}, "prompt"
    ),
    "llamacpp": EngineKind("llama.cpp", "repeat_penalty", 0, {}, "content"),
    "qwen": EngineKind("Qwen Chat", "repetition_penalty", 0, {}),
}


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model of an engine.

    Attributes:
        id: What requests name.
        context_length: Tokens of prompt and reply together; 0 where the engine does not tell.
        kind: The engine.
    """

    id: str
    context_length: int = 0
    kind: EngineKind = field(default=UNKNOWN)

    @property
    def name(self) -> str:
        """The id as a user may read it: without the folders of the engine's machine."""
        return (
            self.id.replace("\\", "/").rstrip("/").split("/")[-1] if _is_path(self.id) else self.id
        )


def _is_path(model_id: str) -> bool:
    return model_id.startswith(("/", "./", "~")) or "\\" in model_id or model_id.count("/") > 1


def choose_models(listing: object, wanted: str) -> tuple[RemoteModel, ...]:
    """Read the answer of `GET /models`; returns the wanted model, then the others, each name once.

    Args:
        listing: The decoded JSON.
        wanted: A model's id or name; empty takes the first.

    Raises:
        EngineFailed: It is no model list.
        EngineRefused: There is no model, or not the wanted one.
    """
    entries = listing.get("data") if isinstance(listing, Mapping) else None
    if not isinstance(entries, list):
        raise EngineFailed(
            "The server at --base-url answers, but not with a model list. Check the address: most "
            "engines want it to end in /v1."
        )
    models = [model for model in map(_read_entry, entries) if model is not None]
    if not models:
        raise EngineRefused(
            "The engine at --base-url lists no model. Load one there, then try again."
        )
    found = [model for model in models if not wanted or wanted in (model.id, model.name)]
    if found:
        by_name: dict[str, RemoteModel] = {}
        for model in (found[0], *models):
            by_name.setdefault(model.name, model)
        return tuple(by_name.values())
    raise EngineRefused(
        f"The engine has no model {wanted}. It has: {name_models(models)}. Choose with --model."
    )


def name_models(models: Sequence[RemoteModel]) -> str:
    """Return the names of models with commas between; of many, the first."""
    return ", ".join(model.name for model in models[:8]) + (" …" if len(models) > 8 else "")


def _read_entry(entry: object) -> RemoteModel | None:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), str) or not entry["id"]:
        return None
    meta = entry.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    lengths = (
        entry.get("max_model_len"),
        meta.get("n_ctx"),
        entry.get("context_length"),
        entry.get("context_window"),
    )
    known = [n for n in lengths if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    kind = KINDS.get(str(entry.get("owned_by")).lower(), UNKNOWN)
    return RemoteModel(entry["id"], known[0] if known else 0, kind)
