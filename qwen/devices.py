"""Where a loaded model runs, also one whose layers lie on several devices or on disk.

Reads what Transformers and accelerate note on a model when they place it. Decides nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Places where weights only wait: they are computed with on another device.
_WAITING_ROOMS = ("cpu", "disk")


def input_device(model: Any) -> torch.device:
    """Tell on which device a model wants its inputs and gives its outputs.

    `model.device` is that of the first weight, which is "meta" while that waits on disk.
    """
    import torch

    device: torch.device = model.device
    if device.type != "meta":
        return device
    running = [place for place in _places(model) if place not in _WAITING_ROOMS]
    return torch.device(_spelled(running[0]) if running else "cpu")


def describe_devices(model: Any) -> str:
    """Name the devices that hold a model's weights, as "cuda:0 + cuda:1" or "cpu + disk"."""
    places = _places(model)
    if len(places) < 2:
        return "disk" if "disk" in places else str(model.device)
    return " + ".join(_spelled(place) for place in places)


def waiting_rooms(model: Any) -> tuple[str, ...]:
    """Name the places from which weights are brought each time they are used; mostly none."""
    places = [str(place) for place in _places(model)]
    if len(places) == 1 and places != ["disk"]:
        return ()
    is_on_gpu = any(place not in _WAITING_ROOMS for place in places)
    return tuple(p for p in places if p == "disk" or (p == "cpu" and is_on_gpu))


def _places(model: Any) -> list[int | str]:
    """List the different places of a model's parts: numbers of GPUs, and names of other places."""
    placed = (getattr(model, "hf_device_map", None) or {}).values()
    named = [_index_or_name(place) for place in placed]
    gpus = sorted({place for place in named if isinstance(place, int)})
    others = {place for place in named if isinstance(place, str)}
    return [*gpus, *sorted(others)]


def _spelled(place: int | str) -> str:
    return f"cuda:{place}" if isinstance(place, int) else place


def _index_or_name(place: Any) -> int | str:
    if isinstance(place, int):
        return place
    device = str(place)
    return int(device.removeprefix("cuda:")) if device.startswith("cuda:") else device
