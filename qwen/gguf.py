"""A GGUF file → a Transformers folder in the cache, once for each file and dtype.

Reading GGUF is Transformers' own work (it takes half a minute for 0.5 B parameters, its folder
two seconds); this module keeps the result and adds what GGUF does not carry. Format: GGUF v2 and
v3. Knows no hub.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen.backend import ReportProgress, ignore_progress
from qwen.checkpoint_files import check_weight_files, missing_files
from qwen.errors import (
    CheckpointDamaged,
    CheckpointUnsupported,
    OutOfMemory,
    QwenError,
    is_out_of_memory,
)
from qwen.gguf_header import read_gguf_header
from qwen.weights_cache import (
    disk_full_explained,
    is_disk_full,
    locked,
    make_folder,
    require_space,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

WeightsDtype = Literal["bfloat16", "float16", "float32"]

_BYTES_PER_WEIGHT: dict[WeightsDtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}

#: Counts up when the folder's content changes for the same file, so that old folders are left.
_LAYOUT = 1

#: Bytes beside the weights: the tokenizer's files, generously.
_EXTRA_BYTES = 32 * 10**6

#: Tokens that end a reply of a chat model of the Qwen family, where its vocabulary has them.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file and what it becomes.

    Attributes:
        path: Where it lies; it need not exist any more once it has been converted.
        key: Another one for every content; part of the folder's name.
        name: Of the model, as a user knows it.
        generation: Content of `generation_config.json`; None derives the end tokens only.
    """

    path: Path
    key: str
    name: str
    generation: Mapping[str, object] | None = None


def local_gguf(path: Path) -> GgufFile:
    """Describe a user's own file, told from others by its place, size and time of change."""
    path = path.expanduser().absolute()
    stat = path.stat()
    identity = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
    return GgufFile(path=path, key=digest, name=path.stem)


def converted_folder(file: GgufFile, *, dtype: WeightsDtype, cache: Path) -> Path:
    """Return where a file's converted weights lie, or would lie; touches no disk."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", file.name)[:80]
    return cache / "converted" / f"{stem}-{file.key[:16]}-{dtype}-{_LAYOUT}"


def is_whole(folder: Path) -> bool:
    """Tell whether a converted folder is there with all its files at full length."""
    if not folder.is_dir() or missing_files(folder):
        return False
    try:
        check_weight_files(folder)
    except CheckpointDamaged:
        return False
    return True


def convert_gguf(
    file: GgufFile,
    *,
    dtype: WeightsDtype,
    cache: Path,
    report: ReportProgress = ignore_progress,
) -> Path:
    """Return the folder with a file's weights, converting it if that has not been done yet.

    Processes that share the cache wait for each other.

    Raises:
        CheckpointDamaged: The file is cut short or no GGUF file.
        CheckpointUnsupported: The architecture or the quantisation cannot be read.
        DiskFull: There is no room for the converted weights.
        OutOfMemory: The weights do not fit into memory.
    """
    folder = converted_folder(file, dtype=dtype, cache=cache)
    if is_whole(folder):
        return folder
    make_folder(folder.parent)
    with locked(folder, report=report):
        if is_whole(folder):
            return folder
        shutil.rmtree(folder, ignore_errors=True)  # damaged, if it is there at all
        beside = folder.with_name(folder.name + ".part")
        shutil.rmtree(beside, ignore_errors=True)
        weights = read_gguf_header(file.path).num_weights
        needed = weights * _BYTES_PER_WEIGHT[dtype] + _EXTRA_BYTES
        require_space(folder.parent, needed)
        try:
            with disk_full_explained(folder.parent, needed):
                _convert(file, dtype, beside, report)
            beside.replace(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def _damaged(path: Path, why: str) -> CheckpointDamaged:
    return CheckpointDamaged(f"{path} is damaged: {why}. Remove it and fetch it again.")


def _unsupported(path: Path, error: Exception) -> CheckpointUnsupported:
    return CheckpointUnsupported(
        f"{path} cannot be read: {str(error).strip().splitlines()[0]} Choose a GGUF file of "
        "another model or quantisation, or the checkpoint in the Transformers format."
    )


def _convert(file: GgufFile, dtype: WeightsDtype, folder: Path, report: ReportProgress) -> None:
    """Read a GGUF file and write it as a Transformers folder."""
    failure: QwenError | None = None
    try:
        with quiet_transformers():
            report("Unpacking the weights (only the first time)")
            model = _load_weights(file.path, dtype)
            report("Unpacking the vocabulary (only the first time)")
            tokenizer = _load_tokenizer(file.path, model.config.max_position_embeddings)
            report("Writing the unpacked weights (only the first time)")
            model.config._model_name_or_path = file.name
            model.generation_config = _generation_config(file.generation, tokenizer)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:
        if is_disk_full(error):
            raise
        logger.warning("Converting %s failed", file.path, exc_info=error)
        failure = _conversion_failure(file.path, error)
    if failure is not None:  # raised out here, where no traceback holds the weights any more
        raise failure
    _check_written(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep Transformers' own progress bars off the terminal; we report progress ourselves."""
    from transformers.utils import logging as transformers_logging

    bars: Any = transformers_logging
    was_on = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            bars.enable_progress_bar()


def _conversion_failure(path: Path, error: Exception) -> QwenError:
    if isinstance(error, QwenError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(
            f"There is not enough memory to unpack {path.name}. Close other programs, or choose a "
            "smaller model."
        )
    if isinstance(error, ImportError) or "not supported" in str(error):
        return _unsupported(path, error)
    return _damaged(path, "its weights or its vocabulary cannot be read")


def _load_weights(path: Path, dtype: WeightsDtype) -> PreTrainedModel:
    """Read a GGUF file's weights, unpacked to a dtype: packed ones decode at a crawl."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
        local_files_only=True,
        output_loading_info=True,
    )
    model: PreTrainedModel
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise _damaged(path, f"the tensor {missing[0]} is not there")
    # What is unpacked is no longer quantised, and must not say so in config.json.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _load_tokenizer(path: Path, context_length: int) -> PreTrainedTokenizerBase:
    """Read a GGUF file's tokenizer.

    GGUF has no field for normalisation; Qwen2 tokenizers put text into NFC first, and without it
    text in decomposed form gets other tokens. Transformers reads no `tokenizer.ggml.pre` either:
    SmolLM's ("smollm") takes digits one by one, and without that numbers get other tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    if type(tokenizer).__name__.startswith("Qwen2"):
        from tokenizers.normalizers import NFC

        tokenizer.backend_tokenizer.normalizer = NFC()
    if read_gguf_header(path).values.get("tokenizer.ggml.pre") == "smollm":
        from tokenizers.pre_tokenizers import Digits, Sequence

        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.model_max_length = context_length
    return tokenizer


def _generation_config(
    given: Mapping[str, object] | None, tokenizer: PreTrainedTokenizerBase
) -> Any:
    """Return the generation settings to write beside the weights."""
    from transformers import GenerationConfig

    make: Any = GenerationConfig
    if given is not None:
        return make(**given)
    added = tokenizer.get_added_vocab()
    ends = {added[token]: None for token in _END_TOKENS if token in added}
    if tokenizer.eos_token_id is not None:
        ends = {tokenizer.eos_token_id: None, **ends}
    return make(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(ends) or None,
    )


def _check_written(folder: Path) -> None:
    """Refuse a conversion that lost files or the output matrix: an internal fault, not the user's.

    A GGUF file may store the output matrix apart from the embedding, and more precisely; a
    config.json that ties them would make Transformers drop it without a word.
    """
    missing = missing_files(folder)
    check_weight_files(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if missing or "tie_word_embeddings" not in config:
        raise CheckpointDamaged(f"The unpacked weights lack {', '.join(missing) or 'a setting'}.")
