"""Which device holds which part of a model: one GPU, several, memory, disk.

Decides from sizes, before any weight is read; Transformers and accelerate do the placing. Knows no
weights and no decoding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen.checkpoint_files import check_weight_files, load_json, weight_files
from qwen.devices import waiting_rooms
from qwen.errors import CheckpointError, InvalidSetting, OutOfMemory
from qwen.free_memory import FreeMemory, read_free_memory
from qwen.weights_cache import format_bytes, require_space

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Bytes that a conversation wants beside the weights. Published for Qwen-7B, -14B and -7B-Int4 at
#: 2,048 tokens: 1.8 to 2.3 GB; a model smaller than those wants a quarter of its weights.
_MOST_WORKING_ROOM = 2_500_000_000

#: Of free memory, what weights may take: as Transformers has it, against spikes while loading.
_PART_OF_MEMORY = 0.9

_MOVE_OFFLOAD = "Free some space, or name a folder on a larger disk (--offload-folder)."

#: Names of the parts that are not layers, and of the layers, by layout.
_PARTS = {
    "qwen": (("transformer.wte", "transformer.drop", "transformer.ln_f"), "transformer.h"),
    "qwen2": (("model.embed_tokens", "model.rotary_emb", "model.norm"), "model.layers"),
}
_PARTS["qwen3"] = _PARTS["qwen2"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model goes.

    Attributes:
        device_map: As Transformers takes it: module → GPU's number or device; "auto" has accelerate
            fill the places of `max_memory`; None is the CPU.
        max_memory: Bytes of weights for each GPU's number and "cpu"; None is no limit.
        offload_folder: Where weights are kept that fit nowhere else.
    """

    device_map: Mapping[str, int | str] | str | None = None
    max_memory: Mapping[int | str, int] | None = None
    offload_folder: Path | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `from_pretrained`."""
        options: dict[str, Any] = {"device_map": self.device_map}
        if isinstance(self.device_map, Mapping):
            options["device_map"] = dict(self.device_map)
        if self.max_memory is not None:
            options["max_memory"] = dict(self.max_memory)
        if self.offload_folder is not None:
            options["offload_folder"] = str(self.offload_folder)
        return options

    @property
    def single_device(self) -> str | None:
        """Return the device that holds all weights, as torch spells it; None if there are more."""
        if self.device_map is None:
            return "cpu"
        if isinstance(self.device_map, str) or len(set(self.device_map.values())) != 1:
            return None
        (place,) = set(self.device_map.values())
        return f"cuda:{place}" if isinstance(place, int) else place


def place_on(device: str) -> Placement:
    """Return the placement of a whole model on one device, as torch spells it."""
    return Placement(None if device == "cpu" else {"": device})


def choose_placement(
    size: int,
    free: FreeMemory,
    *,
    num_gpus: int | None = None,
    offload_folder: Path | None = None,
) -> Placement:
    """Choose the places for weights of a size: one GPU if it has room, else several, else more.

    What does not fit the GPUs waits in memory, and what does not fit there waits on disk if a
    folder is named. Both are slow, so `placement_notices` tells the user.

    Args:
        size: Bytes of all weights, as they are computed with.
        free: What there is. Without a GPU all is computed on the CPU.
        num_gpus: Take the first so many GPUs; None takes as few as needed.
        offload_folder: Allows weights to wait on disk.

    Raises:
        InvalidSetting: There are not so many GPUs.
        OutOfMemory: Nothing has room.
    """
    if num_gpus is not None:
        check_num_gpus(num_gpus, available=len(free.gpus))
    gpus = free.gpus[:num_gpus]
    rooms = [_room(gpu, size) for gpu in gpus]
    memory = int(free.memory * _PART_OF_MEMORY)
    if num_gpus is None or num_gpus == 1:
        for number, room in enumerate(rooms):
            if size <= room:
                return Placement({"": number})
    is_too_large = size > sum(rooms) + memory
    if not gpus and not (is_too_large and offload_folder):
        return Placement()  # a preflight or the allocator says what is wrong, should it not fit
    if is_too_large and offload_folder is None:
        raise OutOfMemory(
            f"The weights need {format_bytes(size)}, but {_count_gpus(len(gpus))} and the memory "
            f"have room for {format_bytes(sum(rooms) + memory)}. Choose a smaller or an Int4 "
            "checkpoint, or name a folder to keep weights on disk (--offload-folder), which is "
            "very slow."
        )
    limits: dict[int | str, int] = dict(enumerate(rooms))
    return Placement("auto", limits | {"cpu": memory}, offload_folder)


def check_num_gpus(num_gpus: int, *, available: int) -> None:
    """Refuse a number of GPUs that a machine does not have.

    Raises:
        InvalidSetting: With how many there are and what to do.
    """
    if isinstance(num_gpus, bool) or not isinstance(num_gpus, int) or num_gpus < 1:
        raise InvalidSetting(
            f"The number of GPUs must be a whole number above 0, not {num_gpus!r}. To run on the "
            "CPU, say so by --cpu-only (device='cpu')."
        )
    if num_gpus > available:
        advice = (
            f"Ask for {available} at most (--num-gpus), or leave the number out."
            if available
            else "Leave the number out to run on the CPU. If this machine has GPUs, look whether "
            "nvidia-smi lists them and torch is a CUDA build."
        )
        raise InvalidSetting(
            f"{_count_gpus(num_gpus)} were asked for, but torch finds {available or 'none'} here. "
            f"{advice}"
        )


def layer_device_map(
    num_layers: int, num_gpus: int, *, model_type: str = "qwen", edge_layers: int = 2
) -> dict[str, int]:
    """Deal out a model's layers to GPUs, evenly and in order.

    GPU 0 holds the embedding, the last norm and the head too: tokens come in and are chosen there,
    and tied weights stay together. It gets fewer layers for it.

    Args:
        num_layers: How many layers there are.
        num_gpus: GPUs 0 to num_gpus - 1 are used.
        model_type: "qwen" (`transformer.h.N`), "qwen2" or "qwen3" (`model.layers.N`).
        edge_layers: How many layers embedding and head weigh.

    Returns:
        Module → GPU's number.

    Raises:
        InvalidSetting: There are more GPUs than layers, or no GPU.
    """
    check_num_gpus(num_gpus, available=max(num_gpus, 1) if isinstance(num_gpus, int) else 0)
    if num_gpus > num_layers:
        raise InvalidSetting(
            f"A model of {num_layers} layers cannot be spread over {num_gpus} GPUs. Ask for "
            f"{num_layers} at most."
        )
    edges, layers = _PARTS[model_type]
    first = num_layers
    if num_gpus > 1:  # GPU 0's even share, less what it holds beside layers; the others keep one
        first = round((num_layers + edge_layers) / num_gpus) - edge_layers
        first = min(max(first, 0), num_layers - (num_gpus - 1))
    placed = dict.fromkeys((*edges, "lm_head"), 0)
    for layer in range(num_layers):
        later = (layer - first) * (num_gpus - 1) // max(num_layers - first, 1)
        placed[f"{layers}.{layer}"] = 0 if layer < first else 1 + later
    return placed


def place_model(
    folder: Path,
    *,
    dtype: str,
    use_cuda: bool,
    num_gpus: int | None = None,
    offload_folder: Path | None = None,
) -> Placement:
    """Choose the places of the checkpoint in a folder, on this machine as it is now.

    Args:
        folder: Configuration and safetensors.
        dtype: Of the weights once loaded.
        use_cuda: False is the CPU.
        num_gpus: See `choose_placement`.
        offload_folder: See `choose_placement`; it is made if it is not there.

    Raises:
        InvalidSetting: There are not so many GPUs.
        OutOfMemory: Nothing has room.
        CheckpointDamaged: A file is cut short or altered.
        CheckpointError: The offload folder cannot be written to.
        DiskFull: The offload folder's disk has too little room.
    """
    import torch

    count = torch.cuda.device_count() if use_cuda else 0
    if num_gpus is not None:
        check_num_gpus(num_gpus, available=count)
    check_weight_files(folder)
    sizes = tensor_sizes(folder, dtype=dtype)
    size = sum(sizes.values())
    free = read_free_memory(gpus=min(count, num_gpus or 1))
    # A look at a GPU takes some hundred MB of it, so the others are left alone while one will do.
    if num_gpus is None and count > 1 and size > _room(free.gpus[0], size):
        free = read_free_memory(gpus=count)
    placement = choose_placement(size, free, num_gpus=num_gpus, offload_folder=offload_folder)
    config = load_json(folder / "config.json")
    if num_gpus is not None and num_gpus > 1:
        even = _split_evenly(sizes, config, [_room(gpu, size) for gpu in free.gpus])
        placement = Placement(even) if even else placement
    if placement.offload_folder is not None:
        elsewhere = sum((placement.max_memory or {}).values())
        _prepare_offload_folder(
            placement.offload_folder, max(size - elsewhere, 0) if _is_rewritten(config) else 0
        )
    return placement


def tensor_sizes(folder: Path, *, dtype: str) -> dict[str, int]:
    """Read from the headers of a folder's safetensors how many bytes each tensor takes once loaded.

    Floating-point weights are cast to `dtype`; packed ones stay as they are.
    """
    from safetensors import safe_open

    width = {"float32": 4}.get(dtype, 2)
    bits = {"F64": width, "F32": width, "F16": width, "BF16": width, "I64": 8, "I32": 4, "I16": 2}
    sizes = {}
    for file in weight_files(folder):
        with safe_open(folder / file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                part = weights.get_slice(name)
                sizes[name] = math.prod(part.get_shape()) * bits.get(part.get_dtype(), 1)
    return sizes


def placement_notices(model: PreTrainedModel) -> tuple[str, ...]:
    """Tell a user what to expect of a model that waits on slow places; else nothing."""
    rooms = waiting_rooms(model)
    if not rooms:
        return ()
    places = " and ".join({"cpu": "the computer's memory", "disk": "disk"}[room] for room in rooms)
    return (
        f"Part of the model is kept in {places} and brought for every token, which is slow. A "
        "smaller or an Int4 checkpoint, or more GPUs, would be faster.",
    )


def _split_evenly(
    sizes: Mapping[str, int], config: Mapping[str, Any], rooms: Sequence[int]
) -> dict[str, int] | None:
    """Deal out layers evenly if the layout is known and each GPU has the room; else None."""
    kind, num_layers = config.get("model_type"), config.get("num_hidden_layers")
    if kind not in _PARTS or not isinstance(num_layers, int) or num_layers < len(rooms):
        return None
    prefix = f"{_PARTS[kind][1]}."
    in_layers = sum(size for name, size in sizes.items() if name.startswith(prefix))
    edges = sum(sizes.values()) - in_layers
    layer = max(in_layers / num_layers, 1)
    placed = layer_device_map(
        num_layers, len(rooms), model_type=kind, edge_layers=round(edges / layer)
    )
    needed = [float(edges)] + [0.0] * (len(rooms) - 1)
    for name, gpu in placed.items():
        needed[gpu] += layer if name.startswith(prefix) else 0
    return placed if all(n <= room for n, room in zip(needed, rooms, strict=True)) else None


def _room(free: int, size: int) -> int:
    """Return the bytes that a GPU has for weights, when a conversation is to fit beside them."""
    return max(free - min(size // 4, _MOST_WORKING_ROOM), 0)


def _is_rewritten(config: Mapping[str, Any]) -> bool:
    """Tell whether Transformers rearranges a model's tensors and so must write the offloaded ones.

    It reads all others from the checkpoint's own files.
    """
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightConverter

    known: Any = conversion_mapping.get_checkpoint_conversion_mapping
    entries = known(config.get("model_type")) or ()
    return any(isinstance(entry, WeightConverter) for entry in entries)


def _prepare_offload_folder(folder: Path, needed: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        is_writable = False
    if not is_writable:
        raise CheckpointError(
            f"The folder {folder}, where weights are to be kept on disk, cannot be written to. "
            "Name another one (--offload-folder)."
        )
    require_space(folder, needed, advice=_MOVE_OFFLOAD)


def _count_gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
