"""A checkpoint's name → the sizes of its model, with no weight fetched or read.

Of a hub only config.json is asked, and nothing where its client has the checkpoint on disk. Knows
no machine and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from qwen.adapters import is_adapter, read_adapter
from qwen.carriers import EMBEDDED_MODEL, Hub
from qwen.checkpoint import choose_default, parse_checkpoint
from qwen.errors import HubUnreachable
from qwen.gguf import GgufFile, WeightsDtype, converted_folder, is_whole, local_gguf
from qwen.gguf_header import read_gguf_header
from qwen.hub import fetch_config, find_snapshot
from qwen.memory_model import DTYPE_BYTES, MemoryItem, ModelShape
from qwen.model_shape import shape_of_config, shape_of_folder, shape_of_gguf
from qwen.weights_cache import cache_folder

#: Seconds that silent hubs may cost a look at sizes; loading asks them again, and longer.
PROBE_SECONDS = 2.0

#: Sizes of the embedded model, for a machine that has not fetched it yet. Source: the config.json
#: that its GGUF file becomes.
_EMBEDDED_CONFIG: Mapping[str, object] = MappingProxyType(
    {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
)


@dataclass(frozen=True, slots=True)
class SizedCheckpoint:
    """A checkpoint's model, as far as its memory goes.

    Attributes:
        name: As a user knows it.
        unpacking: Rows for memory that only the first start takes.
    """

    name: str
    shape: ModelShape
    unpacking: tuple[MemoryItem, ...] = ()


def size_checkpoint(
    name: str,
    *,
    dtype: WeightsDtype,
    cuda_memory: int | None = None,
    cache: Path | None = None,
) -> SizedCheckpoint:
    """Find the sizes of the model that a name means.

    Args:
        name: See `qwen.checkpoint`.
        dtype: In which the weights are wanted.
        cuda_memory: Bytes of the GPU's memory, None without CUDA; decides what `auto` is.
        cache: Where downloads and conversions are kept; None is the user's cache folder.

    Raises:
        CheckpointError: There is no such checkpoint, it is damaged or of a kind that is not run.
        HubUnreachable: It is on no disk here, and no hub answered in time.
    """
    parsed = parse_checkpoint(name)
    cache = cache or cache_folder()
    if parsed.kind == "auto":
        repository = choose_default(cuda_memory=cuda_memory)
        if repository:
            try:
                return size_checkpoint(repository, dtype=dtype, cache=cache)
            except HubUnreachable:
                pass  # loading falls back, too
        return _size_embedded(dtype, cache)
    if parsed.kind == "folder":
        folder = Path(parsed.value)
        if is_adapter(folder):
            base = size_checkpoint(read_adapter(folder).base, dtype=dtype, cache=cache)
            return replace(base, name=folder.name)
        return SizedCheckpoint(folder.name or str(folder), shape_of_folder(folder))
    if parsed.kind == "gguf":
        return _size_gguf(local_gguf(Path(parsed.value)), dtype, cache)
    hub: Hub = "modelscope" if parsed.kind == "modelscope" else "huggingface"
    short = parsed.value.rsplit("/", 1)[-1]
    snapshot = find_snapshot(parsed.value, revision=parsed.revision, hub=hub)
    if snapshot is not None:
        return SizedCheckpoint(short, shape_of_folder(snapshot))
    config = fetch_config(
        parsed.value, revision=parsed.revision, hub=hub, probe_seconds=PROBE_SECONDS
    )
    return SizedCheckpoint(short, shape_of_config(config))


def _size_embedded(dtype: WeightsDtype, cache: Path) -> SizedCheckpoint:
    model = EMBEDDED_MODEL
    path = cache / "files" / model.file.name
    file = GgufFile(path=path, key=model.file.sha256, name=model.name)
    folder = converted_folder(file, dtype=dtype, cache=cache)
    if is_whole(folder):
        return SizedCheckpoint(model.name, shape_of_folder(folder))
    return _unpacked(model.name, shape_of_config(_EMBEDDED_CONFIG), dtype, model.file.size)


def _size_gguf(file: GgufFile, dtype: WeightsDtype, cache: Path) -> SizedCheckpoint:
    folder = converted_folder(file, dtype=dtype, cache=cache)
    if is_whole(folder):
        return SizedCheckpoint(file.name, shape_of_folder(folder))
    shape = shape_of_gguf(read_gguf_header(file.path))
    return _unpacked(file.name, shape, dtype, file.path.stat().st_size)


def _unpacked(name: str, shape: ModelShape, dtype: WeightsDtype, size: int) -> SizedCheckpoint:
    """Describe a GGUF file that is yet to be unpacked.

    Measured: all weights in the wanted precision are held, with the largest tensor twice in
    float32, before they are written.
    """
    largest = max(shape.embedding, shape.head)
    held = largest * 8 + shape.embedding * DTYPE_BYTES[dtype]
    rows = (
        MemoryItem("unpacking the GGUF file, the first time", held, "weights", phase="loading"),
        MemoryItem("GGUF file being read", size, "file", phase="loading"),
    )
    return SizedCheckpoint(name, replace(shape, stored_dtype=dtype), rows)
