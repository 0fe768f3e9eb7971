"""What files a checkpoint's folder must hold, and whether its weight files are whole.

Reads headers, never weights; knows no torch. The safetensors header: 8 bytes of length, then JSON
(safetensors format, version 0.x as of library 0.8).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen.errors import CheckpointDamaged

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

#: Any one of these sets makes a tokenizer.
_TOKENIZERS = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("tokenizer.model",),
    ("qwen.tiktoken",),
)


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        CheckpointDamaged: The file is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointDamaged(
            f"{path} is damaged: it is not the JSON that it should be. Fetch this file again."
        )
    return value


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the safetensors files that a folder needs, there or not.

    Raises:
        CheckpointDamaged: The list of the shards cannot be read.
    """
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        return (WEIGHTS,)
    shards = load_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not _are_plain_names(shards.values()):
        raise CheckpointDamaged(f"{index} is damaged: it lists no shards. Fetch this file again.")
    return tuple(sorted(set(shards.values())))


def missing_files(folder: Path) -> tuple[str, ...]:
    """Return what a folder lacks to be a checkpoint; empty when all is there."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    missing += [name for name in weight_files(folder) if not (folder / name).is_file()]
    if not has_tokenizer(folder):
        missing.append(" or ".join(" + ".join(names) for names in _TOKENIZERS))
    return tuple(missing)


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds the files of a tokenizer."""
    return any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS)


def check_weight_files(folder: Path) -> None:
    """Read the headers of a folder's weights and compare them with the files' lengths.

    Raises:
        CheckpointDamaged: A file is cut short or no safetensors file; the message names it.
    """
    for name in weight_files(folder):
        path = folder / name
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            try:
                if not 2 <= header_size <= size - 8:
                    raise ValueError
                entries = json.loads(file.read(header_size))
                ends = [
                    value["data_offsets"][1]
                    for key, value in entries.items()
                    if key != "__metadata__"
                ]
                expected = 8 + header_size + max(ends, default=0)
            except (ValueError, LookupError, TypeError, AttributeError):
                raise CheckpointDamaged(
                    f"{path} is damaged: it does not begin as a safetensors file does. Fetch this "
                    "file again."
                ) from None
        if size != expected:
            raise CheckpointDamaged(
                f"{path} is damaged: it should have {expected} bytes and has {size}. Fetch this "
                "file again."
            )


def _are_plain_names(names: Any) -> bool:
    return all(isinstance(name, str) and name and Path(name).name == name for name in names)
