"""A checkpoint's name → a folder on disk that Transformers can load.

A name is `auto`, a local folder (of a model or a LoRA adapter), a local `.gguf` file,
`OWNER/NAME[@REVISION]` on Hugging Face, or `modelscope:OWNER/NAME[@REVISION]`. Knows where weights
come from, not what is in them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qwen.adapters import is_adapter, read_adapter
from qwen.backend import ReportProgress, ignore_progress
from qwen.carriers import EMBEDDED_MODEL, GgufModel
from qwen.checkpoint_files import missing_files
from qwen.download import fetch_data_file
from qwen.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointUnsupported,
    HubUnreachable,
)
from qwen.gguf import GgufFile, WeightsDtype, convert_gguf, converted_folder, is_whole, local_gguf
from qwen.hub import fetch_snapshot
from qwen.weights_cache import cache_folder

CheckpointKind = Literal["auto", "folder", "gguf", "huggingface", "modelscope"]

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,199}")
_MODELSCOPE_PREFIX = "modelscope:"
_KINDS = (
    "Name a folder, a .gguf file, OWNER/NAME or OWNER/NAME@REVISION on Hugging Face (for example "
    "Qwen/Qwen2.5-0.5B-Instruct), modelscope:OWNER/NAME, or auto."
)

#: GPU memory, in bytes, under which `auto` takes the Int4 weights: bf16 needs 17 GB to answer.
_INT4_BELOW = 18 * 10**9


@dataclass(frozen=True, slots=True)
class CheckpointName:
    """What a user's name for a checkpoint means.

    Attributes:
        value: An absolute path, or OWNER/NAME; empty for "auto".
        revision: Branch, tag or commit on a hub; None is its default.
    """

    kind: CheckpointKind
    value: str = ""
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class ResolvedCheckpoint:
    """A checkpoint on disk.

    Attributes:
        folder: Configuration, tokenizer and safetensors.
        name: As a user knows it.
        notices: Sentences about choices made that a user should know.
        adapter: Folder of a LoRA adapter to be merged into the model in `folder`.
    """

    folder: Path
    name: str
    notices: tuple[str, ...] = ()
    adapter: Path | None = None


def parse_checkpoint(name: str) -> CheckpointName:
    """Tell what a name means; looks at the disk for local names, never at the network.

    Raises:
        CheckpointNotFound: It names nothing that is there, or has none of the forms.
        CheckpointUnsupported: It is a file that is no GGUF file.
    """
    name = name.strip()
    if not name:
        raise CheckpointNotFound(f"No checkpoint was named. {_KINDS}")
    if name == "auto":
        return CheckpointName("auto")
    if name.startswith(_MODELSCOPE_PREFIX):
        return _parse_repository(name.removeprefix(_MODELSCOPE_PREFIX), "modelscope", name)
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError):
        raise CheckpointNotFound(
            f"{_shortened(name)!r} cannot be the name of a checkpoint. {_KINDS}"
        ) from None
    if exists or _looks_local(name):
        return _parse_local(path, exists)
    return _parse_repository(name, "huggingface", name)


def _looks_local(name: str) -> bool:
    repository = name.split("@", 1)[0]
    return (
        name.startswith((".", "/", "~"))
        or (os.sep != "/" and (os.sep in name or ":" in name))
        or name.lower().endswith(".gguf")
        or repository.count("/") > 1
    )


def _parse_local(path: Path, exists: bool) -> CheckpointName:
    path = path.absolute()
    if not exists:
        kind = "file" if path.suffix.lower() == ".gguf" else "folder"
        raise CheckpointNotFound(
            f"There is no {kind} {_shortened(str(path))}. Check the path's spelling. {_KINDS}"
        )
    if path.is_dir():
        return CheckpointName("folder", str(path))
    if path.suffix.lower() == ".gguf":
        return CheckpointName("gguf", str(path))
    raise CheckpointUnsupported(
        f"{path} is a file, and not a .gguf file. Name the folder that holds config.json and the "
        "safetensors files."
    )


def _parse_repository(
    text: str, hub: Literal["huggingface", "modelscope"], name: str
) -> CheckpointName:
    repository, at, revision = text.partition("@")
    sound = _REPOSITORY.fullmatch(repository) and ".." not in text
    if not sound or (at and not _REVISION.fullmatch(revision)):
        raise CheckpointNotFound(
            f"{_shortened(name)!r} is neither a file or folder that is there nor a name on a hub. "
            f"{_KINDS}"
        )
    return CheckpointName(hub, repository, revision or None)


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "…"


def choose_default(*, cuda_memory: int | None) -> str:
    """Choose what `auto` means on a machine.

    Args:
        cuda_memory: Bytes of the GPU's memory; None without CUDA.

    Returns:
        A hub's name, or "" for the embedded model.
    """
    if cuda_memory is None:
        return ""
    return "Qwen/Qwen-7B-Chat-Int4" if cuda_memory < _INT4_BELOW else "Qwen/Qwen-7B-Chat"


def resolve_checkpoint(
    name: str,
    *,
    gguf_dtype: WeightsDtype = "bfloat16",
    cuda_memory: int | None = None,
    cache: Path | None = None,
    report: ReportProgress = ignore_progress,
) -> ResolvedCheckpoint:
    """Find a checkpoint by its name, fetching and converting it where needed.

    Args:
        name: See the module.
        gguf_dtype: What the weights of a GGUF file are unpacked to.
        cuda_memory: Bytes of the GPU's memory, None without CUDA; decides what `auto` is.
        cache: Where downloads and conversions are kept; None is the user's cache folder.
        report: Is told what is being done.

    Raises:
        CheckpointError: It cannot be had; the subclass and the message say why.
        OutOfMemory: A GGUF file does not fit into memory while it is unpacked.
    """
    parsed = parse_checkpoint(name)
    if parsed.kind == "auto":
        repository = choose_default(cuda_memory=cuda_memory)
        notices: tuple[str, ...] = ()
        if repository:
            try:
                return resolve_checkpoint(repository, cache=cache, report=report)
            except HubUnreachable:
                notices = (
                    f"{repository}, which this machine's GPU would run, could not be fetched: no "
                    f"hub answered. {EMBEDDED_MODEL.name} is used instead.",
                )
        folder = resolve_embedded(gguf_dtype=gguf_dtype, cache=cache, report=report)
        return ResolvedCheckpoint(folder, EMBEDDED_MODEL.name, notices)
    if parsed.kind == "folder":
        folder = Path(parsed.value)
        if is_adapter(folder):
            return _resolve_adapter(folder, gguf_dtype=gguf_dtype, cache=cache, report=report)
        return _resolve_folder(folder)
    if parsed.kind == "gguf":
        file = local_gguf(Path(parsed.value))
        folder = convert_gguf(file, dtype=gguf_dtype, cache=cache or cache_folder(), report=report)
        return ResolvedCheckpoint(folder, file.name)
    hub: Literal["huggingface", "modelscope"] = (
        "modelscope" if parsed.kind == "modelscope" else "huggingface"
    )
    snapshot = fetch_snapshot(parsed.value, revision=parsed.revision, hub=hub, report=report)
    display = parsed.value.rsplit("/", 1)[-1]
    return ResolvedCheckpoint(snapshot.folder, display, snapshot.notices)


def resolve_embedded(
    *,
    model: GgufModel = EMBEDDED_MODEL,
    gguf_dtype: WeightsDtype = "bfloat16",
    cache: Path | None = None,
    report: ReportProgress = ignore_progress,
) -> Path:
    """Return the folder of a model that this project hands out.

    Once it has been converted, neither the network nor the GGUF file is touched again.
    """
    cache = cache or cache_folder()
    file = GgufFile(
        path=cache / "files" / model.file.name,
        key=model.file.sha256,
        name=model.name,
        generation=model.generation,
    )
    folder = converted_folder(file, dtype=gguf_dtype, cache=cache)
    if is_whole(folder):
        return folder
    path = fetch_data_file(model.file, folder=cache / "files", report=report)
    return convert_gguf(replace(file, path=path), dtype=gguf_dtype, cache=cache, report=report)


def _resolve_adapter(
    folder: Path, *, gguf_dtype: WeightsDtype, cache: Path | None, report: ReportProgress
) -> ResolvedCheckpoint:
    """Find the base model of an adapter; see `qwen.adapters`."""
    adapter = read_adapter(folder)
    if Path(adapter.base).is_dir() and is_adapter(Path(adapter.base)):
        raise CheckpointUnsupported(
            f"The base of the adapter in {folder} is an adapter itself ({adapter.base}). Merge "
            "that one into its base model, save the merged model, and name it as the base."
        )
    try:
        base = resolve_checkpoint(adapter.base, gguf_dtype=gguf_dtype, cache=cache, report=report)
    except (CheckpointNotFound, HubUnreachable) as error:
        looked_at = f" (not on disk at {adapter.looked_at})" if adapter.looked_at else ""
        raise type(error)(
            f"The adapter in {folder} has the base model {adapter.base}{looked_at}: {error} A base "
            "on disk is named by base_model_name_or_path in adapter_config.json."
        ) from error
    notice = f"The adapter {folder.name} is merged into its base model {base.name}."
    return replace(base, name=folder.name, notices=(*base.notices, notice), adapter=folder)


def _resolve_folder(folder: Path) -> ResolvedCheckpoint:
    missing = missing_files(folder)
    if "config.json" in missing:
        raise CheckpointNotFound(
            f"{folder} holds no checkpoint: it lacks {', '.join(missing)}. Name the folder that "
            "holds these files."
        )
    if missing:
        raise CheckpointDamaged(
            f"The checkpoint in {folder} is incomplete: it lacks {', '.join(missing)}. Fetch the "
            "missing files again; weights must be in the safetensors format."
        )
    return ResolvedCheckpoint(folder, folder.name or str(folder))
