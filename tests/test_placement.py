"""Placement: which GPU holds which layer, what waits on disk, and equal numbers wherever it is."""

from __future__ import annotations

import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_v1 import golden_ids
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoint import write_tiny_folder
from tiny_layouts import write_qwen1, write_qwen2

import app
import qwen
import qwen.placement
from qwen import AutoModelForCausalLM, AutoTokenizer
from qwen.devices import describe_devices, input_device
from qwen.engine import Engine
from qwen.errors import CheckpointError, DiskFull, InvalidSetting, OutOfMemory
from qwen.free_memory import FreeMemory
from qwen.load_options import LoadOptions
from qwen.loading import load_folder, load_model, load_model_on_gpus
from qwen.local import load_backend
from qwen.messages import SamplingParams
from qwen.placement import (
    Placement,
    choose_placement,
    layer_device_map,
    place_model,
    place_on,
    placement_notices,
    tensor_sizes,
)

GB = 10**9


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "qwen": write_qwen1(folder / "v1"),
        "qwen2": write_qwen2(folder / "v2"),
        "tied": write_qwen2(folder / "tied", tie_word_embeddings=True),
    }


def size_of(folder: Path) -> int:
    return sum(tensor_sizes(folder, dtype="float32").values())


def offloaded(folder: Path, part: float, **options: Any) -> Placement:
    """Leave memory for a part of the weights only; the rest goes to disk."""
    return Placement("auto", {"cpu": int(size_of(folder) * part)}, **options)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


# Dealing out layers


@given(st.data())
def test_every_layer_has_one_gpu_and_neighbours_stay_together(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 100))
    num_gpus = data.draw(st.integers(1, min(num_layers, 16)))
    edge = data.draw(st.integers(0, 12))
    kind = data.draw(st.sampled_from(["qwen", "qwen2", "qwen3"]))
    placed = layer_device_map(num_layers, num_gpus, model_type=kind, edge_layers=edge)
    prefix = "transformer.h." if kind == "qwen" else "model.layers."
    layers = {name: gpu for name, gpu in placed.items() if name.startswith(prefix)}
    assert list(layers) == [f"{prefix}{i}" for i in range(num_layers)]
    gpus = list(layers.values())
    assert gpus == sorted(gpus)
    assert set(gpus) | {0} == set(range(num_gpus))
    counts = [gpus.count(gpu) for gpu in range(1, num_gpus)]
    assert max(counts, default=0) - min(counts, default=0) <= 1
    assert {gpu for name, gpu in placed.items() if name not in layers} == {0}


def test_gpu_0_gets_fewer_layers_for_embedding_and_head() -> None:
    placed = layer_device_map(32, 2, edge_layers=6)
    assert placed["transformer.h.12"] == 0 and placed["transformer.h.13"] == 1
    assert placed["lm_head"] == placed["transformer.wte"] == placed["transformer.ln_f"] == 0


@pytest.mark.parametrize("kind", ["qwen", "qwen2"])
def test_map_names_every_weight_of_the_model(folders: dict[str, Path], kind: str) -> None:
    model, _ = load_folder(folders[kind])
    placed = layer_device_map(model.config.num_hidden_layers, 2, model_type=kind)
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        assert sum(name.startswith(f"{part}.") for part in placed) == 1, name


@pytest.mark.parametrize("num_gpus", [0, -1, 2.5, True, "2"])
def test_number_of_gpus_must_be_above_0(num_gpus: Any) -> None:
    with pytest.raises(InvalidSetting, match="above 0"):
        layer_device_map(8, num_gpus)


def test_more_gpus_than_layers_are_refused() -> None:
    with pytest.raises(InvalidSetting, match="3 layers cannot be spread over 4"):
        layer_device_map(3, 4)


# Choosing


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ((24,), {"": 0}),
        ((24, 24), {"": 0}),
        ((4, 24), {"": 1}),  # somebody else is on the first
    ],
)
def test_model_goes_to_one_gpu_that_has_room(gpus: tuple[int, ...], expected: Any) -> None:
    free = FreeMemory(memory=64 * GB, gpus=tuple(n * GB for n in gpus))
    assert choose_placement(15 * GB, free).device_map == expected


def test_model_that_is_too_large_for_one_gpu_takes_all() -> None:
    free = FreeMemory(memory=64 * GB, gpus=(24 * GB, 24 * GB))
    placement = choose_placement(28 * GB, free)
    assert placement.device_map == "auto" and placement.single_device is None
    room = 24 * GB - 2_500_000_000
    assert placement.max_memory == {0: room, 1: room, "cpu": int(64 * GB * 0.9)}


def test_small_model_is_not_asked_for_the_room_of_a_large_one() -> None:
    free = FreeMemory(memory=8 * GB, gpus=(2 * GB,))
    assert choose_placement(1 * GB, free).device_map == {"": 0}


def test_asked_number_of_gpus_is_a_limit() -> None:
    free = FreeMemory(memory=64 * GB, gpus=(24 * GB, 24 * GB))
    assert choose_placement(28 * GB, free, num_gpus=1).max_memory == {
        0: 24 * GB - 2_500_000_000,
        "cpu": int(64 * GB * 0.9),
    }


@pytest.mark.parametrize(("asked", "there"), [(2, 1), (3, 2), (1, 0)])
def test_too_many_gpus_are_refused_with_how_many_there_are(asked: int, there: int) -> None:
    free = FreeMemory(memory=64 * GB, gpus=(24 * GB,) * there)
    with pytest.raises(InvalidSetting) as caught:
        choose_placement(GB, free, num_gpus=asked)
    text = str(caught.value)
    assert f"torch finds {there or 'none'} here" in text
    assert "leave the number out" in text.lower()


def test_what_fits_nowhere_is_refused_unless_a_folder_is_named(tmp_path: Path) -> None:
    free = FreeMemory(memory=10 * GB, gpus=(8 * GB,))
    with pytest.raises(OutOfMemory, match=r"need 30\.00 GB.*--offload-folder"):
        choose_placement(30 * GB, free)
    placement = choose_placement(30 * GB, free, offload_folder=tmp_path)
    assert placement.device_map == "auto" and placement.offload_folder == tmp_path
    assert placement.options["offload_folder"] == str(tmp_path)


def test_cpu_takes_the_disk_only_when_it_must(tmp_path: Path) -> None:
    free = FreeMemory(memory=10 * GB)
    assert choose_placement(8 * GB, free, offload_folder=tmp_path) == Placement()
    assert choose_placement(30 * GB, free) == Placement()
    placement = choose_placement(30 * GB, free, offload_folder=tmp_path)
    assert placement.max_memory == {"cpu": 9 * GB}


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", (None, "cpu")), ("cuda:1", ({"": "cuda:1"}, "cuda:1"))],
)
def test_place_on_one_device(device: str, expected: Any) -> None:
    placement = place_on(device)
    assert (placement.device_map, placement.single_device) == expected


def test_sizes_are_those_of_the_loaded_weights(folders: dict[str, Path]) -> None:
    model, _ = load_folder(folders["qwen"])
    loaded = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    assert tensor_sizes(folders["qwen"], dtype="float32") == loaded
    half = tensor_sizes(folders["qwen"], dtype="bfloat16")
    assert half == {name: size // 2 for name, size in loaded.items()}


# GPUs that are only pretended


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Pretend two GPUs; returns what they have free, to be changed, in a list of one."""
    free: list[tuple[int, ...]] = [(24 * GB, 24 * GB)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    looks = lambda gpus: FreeMemory(memory=64 * GB, gpus=free[0][:gpus])  # noqa: E731
    monkeypatch.setattr(qwen.placement, "read_free_memory", looks)
    return free


def test_asked_gpus_share_the_layers_evenly(
    folders: dict[str, Path], two_gpus: list[tuple[int, ...]]
) -> None:
    for kind, prefix in (("qwen", "transformer.h"), ("qwen2", "model.layers")):
        placed = place_model(folders[kind], dtype="float32", use_cuda=True, num_gpus=2)
        assert isinstance(placed.device_map, dict)
        assert placed.device_map["lm_head"] == 0 and placed.device_map[f"{prefix}.1"] == 1


def test_uneven_gpus_are_filled_by_their_room(
    folders: dict[str, Path], two_gpus: list[tuple[int, ...]]
) -> None:
    size = size_of(folders["qwen"])
    two_gpus[0] = (size * 2, size // 4)
    placed = place_model(folders["qwen"], dtype="float32", use_cuda=True, num_gpus=2)
    assert placed.device_map == "auto"


def test_second_gpu_is_used_without_being_asked_when_the_first_is_too_small(
    folders: dict[str, Path], two_gpus: list[tuple[int, ...]]
) -> None:
    size = size_of(folders["qwen"])
    place = lambda: place_model(folders["qwen"], dtype="float32", use_cuda=True)  # noqa: E731
    assert place().device_map == {"": 0}
    two_gpus[0] = (size, size)
    placed = place()
    assert placed.device_map == "auto" and set(placed.max_memory or ()) == {0, 1, "cpu"}


def test_too_many_gpus_are_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, two_gpus: list[tuple[int, ...]]
) -> None:
    monkeypatch.setattr("qwen.loading.resolve_checkpoint", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(InvalidSetting, match="3 GPUs were asked for, but torch finds 2"):
        load_model_on_gpus("Qwen/Qwen-7B-Chat", num_gpus=3)


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_without_a_gpu_load_model_on_gpus_says_so(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], num_gpus: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert qwen.load_model_on_gpus is load_model_on_gpus
    with pytest.raises(InvalidSetting, match="finds none here"):
        load_model_on_gpus(str(folders["qwen"]), num_gpus)


# Numbers wherever the weights are


@pytest.mark.parametrize("kind", ["qwen", "qwen2", "tied"])
@pytest.mark.parametrize("part", [0.67, 0.0])
def test_model_on_disk_gives_the_same_logits(
    folders: dict[str, Path], tmp_path: Path, kind: str, part: float
) -> None:
    whole, _ = load_folder(folders[kind])
    placement = offloaded(folders[kind], part, offload_folder=tmp_path / "offload")
    model, _ = load_folder(folders[kind], placement=placement)
    assert "disk" in model.hf_device_map.values()
    assert ("cpu" in model.hf_device_map.values()) == (part > 0)
    assert input_device(model) == torch.device("cpu")
    assert describe_devices(model) == ("cpu + disk" if part else "disk")
    assert "kept in disk" in placement_notices(model)[0]
    ids = golden_ids(0, 100) % 400  # past the trained length of the v1 checkpoint
    assert torch.equal(logits(model, ids), logits(whole, ids))
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = whole.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("kind", ["qwen", "qwen2"])
@pytest.mark.parametrize("part", [0.67, 0.0])
def test_engine_runs_a_model_on_disk(
    folders: dict[str, Path], tmp_path: Path, kind: str, part: float
) -> None:
    def reply(placement: Placement | None) -> list[int | None]:
        model, _ = load_folder(folders[kind], placement=placement)
        engine = Engine(model, eos_token_ids=[], context_length=128)
        ids = [int(i) for i in golden_ids(0, 80)[0] % 400]
        steps = engine.submit(
            ids, SamplingParams(max_new_tokens=6, temperature=0), cancel=threading.Event()
        )
        return [step.token_id for step in steps]

    placement = offloaded(folders[kind], part, offload_folder=tmp_path)
    assert reply(placement) == reply(None)


def test_chat_of_a_model_on_disk(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["qwen"])
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path}
    replies = []
    for placed in ({}, options):
        model = AutoModelForCausalLM.from_pretrained(folders["qwen"], **placed).eval()
        model.generation_config.update(max_window_size=64, max_new_tokens=4, do_sample=False)
        replies.append(model.chat(tokenizer, "Hi", history=None))
    assert replies[0] == replies[1]


def test_nothing_is_written_for_weights_that_are_read_from_the_checkpoint(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    placement = offloaded(folders["qwen"], 0.5, offload_folder=tmp_path)
    load_folder(folders["qwen"], placement=placement)
    assert list(tmp_path.iterdir()) == []


def test_model_in_one_place_gives_no_notice(folders: dict[str, Path]) -> None:
    model, _ = load_folder(folders["qwen2"])
    assert placement_notices(model) == ()
    assert describe_devices(model) == "cpu"


Placed = namedtuple("Placed", "hf_device_map device")


@pytest.mark.parametrize(
    ("places", "device", "described", "slow"),
    [
        ({"a": 0, "b": 1}, "cuda:0", "cuda:0 + cuda:1", ""),
        ({"a": "cuda:1", "b": 0}, "cuda:1", "cuda:0 + cuda:1", ""),
        ({"a": 0, "b": "cpu"}, "cuda:0", "cuda:0 + cpu", "the computer's memory"),
        ({"a": "cpu", "b": 0, "c": "disk"}, "meta", "cuda:0 + cpu + disk", "memory and disk"),
        ({"": 0}, "cuda:0", "cuda:0", ""),
        ({"": "cpu"}, "cpu", "cpu", ""),
    ],
)
def test_places_are_described(
    places: dict[str, Any], device: str, described: str, slow: str
) -> None:
    model: Any = Placed(places, torch.device(device))
    assert describe_devices(model) == described
    assert input_device(model) == torch.device("cuda:0" if device == "meta" else device)
    notices = placement_notices(model)
    assert slow in notices[0] if slow else notices == ()


def test_flags_reach_the_loader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qwen.local.load_backend", lambda checkpoint, options, report: options)
    monkeypatch.setattr(app, "DeferredBackend", lambda load, on_status: load(print))
    monkeypatch.setattr(app, "serve", lambda settings, backend, activity: backend)
    monkeypatch.setattr(app.Activity, "watch", lambda self, backend: backend)
    flags = ["--num-gpus", "2", "--offload-folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["app.py", *flags])
    options: Any = app.main()
    assert (options.num_gpus, options.offload_folder) == (2, tmp_path)


def test_backend_hands_its_places_to_the_loader(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], tmp_path: Path
) -> None:
    def loader(checkpoint: str, **options: Any) -> None:
        assert (options["num_gpus"], options["offload_folder"]) == (2, tmp_path)
        raise LookupError

    monkeypatch.setattr("qwen.loading.load_model", loader)
    with pytest.raises(LookupError):
        load_backend(str(folders["qwen"]), LoadOptions(num_gpus=2, offload_folder=tmp_path))


# The disk


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> int:
    """Pretend memory for half of the v1 checkpoint."""
    half = size_of(folders["qwen"]) // 2
    monkeypatch.setattr(qwen.placement, "read_free_memory", lambda gpus: FreeMemory(memory=half))
    return half


def test_model_larger_than_memory_loads_by_name_and_says_that_it_is_slow(
    folders: dict[str, Path], tmp_path: Path, little_memory: int
) -> None:
    loaded = load_model(
        str(folders["qwen"]), device="cpu", dtype="float32", offload_folder=tmp_path / "new"
    )
    assert "slow" in loaded.notices[0]
    assert "disk" in describe_devices(loaded.model)


def test_disk_without_room_is_refused_before_the_weights_are_read(
    folders: dict[str, Path], tmp_path: Path, little_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    monkeypatch.setattr("qwen.loading.load_folder", lambda *_, **__: pytest.fail("was read"))
    # Only what Transformers rearranges is written: pretend that it rearranges this model.
    monkeypatch.setattr(qwen.placement, "_is_rewritten", lambda config: True)
    with pytest.raises(DiskFull, match="--offload-folder"):
        load_model(
            str(folders["qwen"]), device="cpu", dtype="float32", offload_folder=tmp_path / "new"
        )


def test_mixture_of_experts_is_known_to_be_rewritten() -> None:
    assert qwen.placement._is_rewritten({"model_type": "qwen2_moe"})
    assert not qwen.placement._is_rewritten({"model_type": "qwen2"})
    assert not qwen.placement._is_rewritten({"model_type": "qwen"})


def test_offload_folder_that_cannot_be_made_is_named(
    folders: dict[str, Path], tmp_path: Path, little_memory: int
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/sub.*cannot be written to"):
        load_model(str(folders["qwen"]), device="cpu", offload_folder=tmp_path / "file" / "sub")


def test_damaged_weights_are_named_before_they_are_placed(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "cut")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model(str(folder), device="cpu")


# Not run without GPUs


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_logits_of_one(folders: dict[str, Path]) -> None:
    for kind in ("qwen", "qwen2"):
        whole, _ = load_folder(folders[kind], device="cuda:0")
        model = load_model_on_gpus(str(folders[kind]), num_gpus=2, dtype="float32")
        assert describe_devices(model) == "cuda:0 + cuda:1"
        ids = golden_ids(0, 100).cuda() % 400
        torch.testing.assert_close(logits(model, ids), logits(whole, ids), atol=2e-4, rtol=1e-4)
        expected = whole.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_memory_and_disk_give_the_logits_of_one_gpu(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    size = size_of(folders["qwen"])
    limits = {0: 9 * size // 10, "cpu": size // 4}  # what is left over goes to disk
    whole, _ = load_folder(folders["qwen"], device="cuda:0")
    model, _ = load_folder(folders["qwen"], placement=Placement("auto", limits, tmp_path))
    ids = golden_ids(0, 100).cuda()
    assert describe_devices(model) == "cuda:0 + disk"
    torch.testing.assert_close(logits(model, ids), logits(whole, ids), atol=2e-4, rtol=1e-4)
