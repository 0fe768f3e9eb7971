"""The header of a GGUF file: its settings and its tensors' shapes, without reading a weight.

Format: GGUF v2 and v3. The `gguf` package reads the same in eight seconds, most of them spent on
the vocabulary, which is only counted here. Knows no model.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qwen.errors import CheckpointDamaged

# Metadata value types of the GGUF specification: strings, arrays, and struct's letters of others.
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS |= {12: "d"}
_LONGEST_STRING = 1 << 26
_DEFAULT_ALIGNMENT = 32

GgufValue = int | float | bool | str


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        values: The settings; of an array its length.
        shapes: Of each tensor by its name, fastest dimension first.
        num_weights: In all tensors.
        size: Bytes that the whole file must have.
    """

    values: Mapping[str, GgufValue]
    shapes: Mapping[str, tuple[int, ...]]
    num_weights: int
    size: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Read a file's header and check that the file is as long as it says.

    Raises:
        CheckpointDamaged: It is cut short or no GGUF file.
    """
    try:
        with path.open("rb") as stream:
            header = _read_header(stream)
    except (ValueError, KeyError, struct.error, OverflowError, RecursionError) as error:
        raise _damaged(path, "its beginning is not that of a GGUF file") from error
    size = path.stat().st_size
    if size < header.size:
        raise _damaged(path, f"it should have {header.size} bytes and has {size}")
    return header


def _damaged(path: Path, why: str) -> CheckpointDamaged:
    return CheckpointDamaged(f"{path} is damaged: {why}. Remove it and fetch it again.")


def _read_header(stream: IO[bytes]) -> GgufHeader:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    magic, version, tensors, entries = struct.unpack("<4sIQQ", stream.read(24))
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("not a GGUF file of version 2 or 3")
    values: dict[str, GgufValue] = {}
    for _ in range(entries):
        key = _read_string(stream)
        (kind,) = struct.unpack("<I", stream.read(4))
        values[key] = _read_value(stream, kind)
    shapes: dict[str, tuple[int, ...]] = {}
    end = 0
    for _ in range(tensors):
        name = _read_string(stream)
        (dimensions,) = struct.unpack("<I", stream.read(4))
        shapes[name] = struct.unpack(f"<{dimensions}Q", stream.read(8 * dimensions))
        kind, offset = struct.unpack("<IQ", stream.read(12))
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        end = max(end, offset + math.prod(shapes[name]) // block * block_bytes)
    alignment = int(values.get("general.alignment") or _DEFAULT_ALIGNMENT)
    size = -(-stream.tell() // alignment) * alignment + end
    return GgufHeader(values, shapes, sum(map(math.prod, shapes.values())), size)


def _read_string(stream: IO[bytes]) -> str:
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > _LONGEST_STRING:
        raise ValueError("a string without an end")
    return stream.read(length).decode("utf-8", "replace")


def _read_value(stream: IO[bytes], kind: int) -> GgufValue:
    """Read one setting; an array is passed over and its length returned."""
    if kind == _STRING:
        return _read_string(stream)
    if kind != _ARRAY:
        letter = _SCALARS[kind]
        value: GgufValue = struct.unpack(f"<{letter}", stream.read(struct.calcsize(letter)))[0]
        return value
    kind, count = struct.unpack("<IQ", stream.read(12))
    if kind in _SCALARS:
        stream.seek(struct.calcsize(_SCALARS[kind]) * count, os.SEEK_CUR)
    else:
        for _ in range(count):
            _skip_value(stream, kind)
    return int(count)


def _skip_value(stream: IO[bytes], kind: int) -> None:
    if kind != _STRING:
        _read_value(stream, kind)
        return
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > _LONGEST_STRING:
        raise ValueError("a string without an end")
    stream.seek(length, os.SEEK_CUR)
