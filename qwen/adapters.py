"""LoRA adapters: a folder with `adapter_config.json` → its base model, with the adapter merged in.

The format is peft's (Hugging Face, 0.21), which also does the merging. Low-rank adaptation: Hu et
al., arXiv:2106.09685. Finds a base on disk and says what hub's name it has otherwise; fetches
nothing.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen.checkpoint_files import has_tokenizer, load_json, missing_files
from qwen.devices import waiting_rooms
from qwen.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointUnsupported,
    OutOfMemory,
    is_out_of_memory,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_KEY = "base_model_name_or_path"


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        folder: Its configuration and weights.
        base: A checkpoint's name: an absolute path, or one on a hub.
        looked_at: Where the base was looked for on disk, for an error's text.
    """

    folder: Path
    base: str
    looked_at: str


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter and no whole model."""
    return (folder / CONFIG).is_file() and bool(
        {"config.json", "model.safetensors"} & set(missing_files(folder))
    )


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's configuration and find its base on disk if it is there.

    A relative path counts from the adapter's folder, else from the working directory.

    Raises:
        CheckpointDamaged: Configuration or weights are not there or not readable.
        CheckpointUnsupported: It is no LoRA adapter.
        CheckpointNotFound: The base is named by a path, and nothing is there.
    """
    config = load_json(folder / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointUnsupported(
            f"The adapter in {folder} is of the kind {kind}; only LoRA adapters are applied. Merge "
            "it into its base model with peft and name the merged folder."
        )
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise CheckpointDamaged(
            f"The adapter in {folder} is incomplete: it lacks {_WEIGHTS[0]}. Fetch this file again."
        )
    name = config.get(_KEY)
    if not isinstance(name, str) or not name.strip() or name == "auto":
        raise CheckpointDamaged(
            f"{folder / CONFIG} names no base model. Set {_KEY} in it to the model that the "
            "adapter was trained on."
        )
    base, looked_at = _find_base(folder, name)
    revision = config.get("revision")
    if revision and not Path(base).is_absolute():
        base = f"{base}@{revision}"
    return Adapter(folder, base, looked_at)


def _find_base(folder: Path, name: str) -> tuple[str, str]:
    """Return the base's path or else its name on a hub, and where it was looked for."""
    path = Path(name).expanduser()
    places = [path] if path.is_absolute() else [folder / path, Path.cwd() / path]
    for place in places:
        if place.exists():
            return str(place.resolve()), ""
    looked_at = " and ".join(dict.fromkeys(str(place.absolute()) for place in places))
    if path.is_absolute() or name.startswith("."):
        raise CheckpointNotFound(
            f"The base model {name} of the adapter in {folder} is not there; looked at "
            f"{looked_at}. Put the model there, or correct {_KEY} in {CONFIG}."
        )
    return name, looked_at


def tokenizer_folder(base: Path, adapter: Path | None) -> Path:
    """Choose whose tokenizer is taken: an adapter's own if it is whole, else the base's."""
    if adapter is None or not has_tokenizer(adapter):
        return base
    return adapter if (adapter / "tokenizer_config.json").is_file() else base


def check_dense(base: Path, adapter: Path) -> None:
    """Refuse a quantised base: an update has no place in packed weights.

    Raises:
        CheckpointUnsupported: With what to do instead.
    """
    if load_json(base / "config.json").get("quantization_config"):
        raise CheckpointUnsupported(
            f"The base model {base} of the adapter in {adapter} is quantised, so the adapter "
            f"cannot be merged into it. Set {_KEY} in {CONFIG} to the unquantised model (for "
            "Qwen-7B-Chat-Int4: Qwen/Qwen-7B-Chat)."
        )


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add an adapter's updates to a model's weights. The model is changed.

    Args:
        model: The base, with weights that are not quantised.
        folder: The adapter's.

    Returns:
        The model, as fast as without an adapter.

    Raises:
        CheckpointDamaged: The adapter's weights cannot be read or do not fit the model.
        CheckpointUnsupported: peft is not installed.
        OutOfMemory: Part of the model waits in memory or on disk, or there is no room.
    """
    if waiting_rooms(model):
        raise OutOfMemory(
            f"The adapter in {folder} can only be merged while its base model fits the memory. "
            "Use a machine with more, and save the merged model there for this one."
        )
    try:
        from peft import PeftConfig, PeftModel, set_peft_model_state_dict
        from peft.utils import load_peft_weights
    except ImportError:
        raise CheckpointUnsupported(
            f"{folder} is an adapter, which the package peft applies: pip install peft==0.21.2"
        ) from None
    try:
        weights = load_peft_weights(str(folder), device="cpu")
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        with warnings.catch_warnings():
            # peft 0.21 asks Transformers 5.23 for something by a name that is to go.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = PeftModel(model, config)
        _check_names(wrapped, weights)
        set_peft_model_state_dict(wrapped, weights)
        merged: Any = wrapped.merge_and_unload(safe_merge=True)
    except CheckpointDamaged as error:
        raise CheckpointDamaged(f"The adapter in {folder} {error}") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise CheckpointDamaged(
            f"The adapter in {folder} cannot be applied to its base model: {reason}. Fetch its "
            f"files again, or name the base that it was trained on ({_KEY} in {CONFIG})."
        ) from error
    for note in ("peft_config", "_hf_peft_config_loaded"):
        merged.__dict__.pop(note, None)
    result: PreTrainedModel = merged.eval()
    return result


def _check_names(wrapped: Any, weights: dict[str, Any]) -> None:
    """Refuse weights that are missing or too many; peft would warn of the former only."""
    from peft import get_peft_model_state_dict

    wanted = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    for names, trouble in (
        (wanted - set(weights), "lacks the tensor"),
        (set(weights) - wanted, "holds a tensor that its base model has no place for:"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointDamaged(
                f"{trouble} {min(names)}{more}. Fetch its files again, or name the base that it "
                f"was trained on ({_KEY} in {CONFIG})."
            )
