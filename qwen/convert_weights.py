"""Tensors from the files of one layout into the files of the other, shard by shard.

Holds one shard in memory. What becomes of each tensor is planned by `qwen.convert_map`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen.backend import ReportProgress, ignore_progress
from qwen.checkpoint_files import WEIGHTS, WEIGHTS_INDEX, weight_files
from qwen.convert_map import BYTES, FLOATS, PlannedTensor, StoredTensor
from qwen.errors import CheckpointDamaged, CheckpointUnsupported
from qwen.weights_cache import format_bytes


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Read names, dtypes and shapes of a folder's tensors, without their values.

    Raises:
        CheckpointUnsupported: A dtype that neither layout was published in.
    """
    stored = {}
    for file in weight_files(folder):
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                tensor = opened.get_slice(name)
                dtype = tensor.get_dtype()
                if dtype not in BYTES:
                    raise CheckpointUnsupported(
                        f"The tensor {name} has the dtype {dtype}, which is not converted. Choose "
                        "a checkpoint in bfloat16, float16, float32 or GPTQ."
                    )
                stored[name] = StoredTensor(file, dtype, tuple(tensor.get_shape()))
    return stored


def dtype_name(plan: Iterable[PlannedTensor]) -> str:
    """Return torch's name for the dtype of the unpacked weights."""
    dtype = next(tensor.dtype for tensor in plan if tensor.dtype in FLOATS)
    return str(FLOATS[dtype]).removeprefix("torch.")


def write_weights(
    plan: Sequence[PlannedTensor],
    stored: Mapping[str, StoredTensor],
    source: Path,
    folder: Path,
    *,
    max_shard_bytes: int,
    report: ReportProgress = ignore_progress,
) -> None:
    """Write the planned tensors, each shard read back and compared bit by bit.

    Args:
        plan: From `plan_weights`.
        stored: From `read_headers` of `source`.
        source: The folder to read from.
        folder: Where to write; holds config.json already.
        max_shard_bytes: A file ends before it is larger, unless one tensor alone is.
        report: Is told of each shard.

    Raises:
        CheckpointDamaged: What was written reads otherwise.
    """
    shards = _split_shards(plan, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        size = sum(tensor.size for tensor in shard)
        report(f"Writing {name} ({format_bytes(size)})")
        _write_shard(shard, stored, source, folder / name)
        # The library makes files that only their owner can read.
        shutil.copymode(folder / "config.json", folder / name)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.size for tensor in plan)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split_shards(plan: Sequence[PlannedTensor], largest: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = []
    size = 0
    for tensor in plan:
        if not shards or size + tensor.size > largest:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    return shards


def _write_shard(
    shard: Sequence[PlannedTensor], stored: Mapping[str, StoredTensor], source: Path, path: Path
) -> None:
    with ExitStack() as stack:  # closes the source's files, which unmaps what was read of them
        files = sorted({stored[name].file for tensor in shard for name in tensor.sources})
        opened = {
            file: stack.enter_context(safe_open(source / file, framework="pt")) for file in files
        }
        tensors = {}
        for planned in shard:
            read = [opened[stored[name].file].get_tensor(name) for name in planned.sources]
            tensors[planned.name] = planned.build(read).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
        written = stack.enter_context(safe_open(path, framework="pt"))
        for planned in shard:
            again, tensor = written.get_tensor(planned.name), tensors[planned.name]
            if tuple(again.shape) != planned.shape or not _are_identical(again, tensor):
                raise CheckpointDamaged(
                    f"The tensor {planned.name} reads otherwise than it was written. Check the "
                    "disk, then convert again."
                )


def _are_identical(one: Tensor, other: Tensor) -> bool:
    # As bytes: a value that is no number equals nothing, not even itself.
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
