"""A checkpoint's name → a folder: forms of names, what auto is, hubs, the embedded model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_hub import COMMIT, LocalHub, SilentServer
from tiny_checkpoint import write_tiny_folder

import qwen.checkpoint
import qwen.hub
from qwen.carriers import DataFile, GgufModel, HubFile
from qwen.checkpoint import (
    CheckpointName,
    choose_default,
    parse_checkpoint,
    resolve_checkpoint,
    resolve_embedded,
)
from qwen.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointUnsupported,
    DiskFull,
    HubUnreachable,
)
from qwen.gguf import GgufFile, converted_folder
from qwen.hub import fetch_snapshot

REPOSITORY = {
    "config.json": b'{"model_type": "qwen2"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"w" * 50_000,
    "pytorch_model.bin": b"pickled",
    "modeling_own.py": b"raise SystemExit('ran')",
    "onnx/model.safetensors": b"other",
    "README.md": b"words",
}


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", CheckpointName("auto")),
        (" auto\n", CheckpointName("auto")),
        ("Qwen/Qwen2.5-0.5B-Instruct", CheckpointName("huggingface", "Qwen/Qwen2.5-0.5B-Instruct")),
        ("Qwen/Q@v1.0", CheckpointName("huggingface", "Qwen/Q", "v1.0")),
        ("Qwen/Q@refs/pr/1", CheckpointName("huggingface", "Qwen/Q", "refs/pr/1")),
        ("modelscope:Qwen/Q", CheckpointName("modelscope", "Qwen/Q")),
        ("modelscope:Qwen/Q@master", CheckpointName("modelscope", "Qwen/Q", "master")),
    ],
)
def test_names_without_files(
    name: str, expected: CheckpointName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_checkpoint(name) == expected


def test_names_of_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "Qwen" / "Mine"
    folder.mkdir(parents=True)
    gguf = tmp_path / "a model.GGUF"
    gguf.write_bytes(b"")
    for name in ("Qwen/Mine", "./Qwen/Mine", str(folder), "~/Qwen/Mine"):
        assert parse_checkpoint(name).kind == "folder"
        assert Path(parse_checkpoint(name).value) == folder
    assert parse_checkpoint("a model.GGUF") == CheckpointName("gguf", str(gguf))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointUnsupported, match=r"notes\.txt is a file"):
        parse_checkpoint("notes.txt")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "   ",
        "Qwen-7B-Chat",
        "./missing",
        "/missing/folder",
        "~/missing",
        "~nobody-of-this-name/folder",
        "../missing/x",
        "missing.gguf",
        "a/b/c",
        "Qwen/..",
        "Qwen/Q@",
        "Qwen/Q@../up",
        "Qwen/Q@a b",
        "Qwen/Q x",
        "-Qwen/Q",
        "modelscope:",
        "modelscope:Q",
        "https://huggingface.co/Qwen/Q",
        "Qwen/\0",
        "x" * 5000,
        "y/" * 3000,
        "Qwen/" + "q" * 97,
    ],
)
def test_names_of_nothing_are_refused_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFound, match="Name a folder") as caught:
        parse_checkpoint(name)
    assert len(str(caught.value)) < 700


# The default's choice


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (None, ""),
        (8 * 10**9, "Qwen/Qwen-7B-Chat-Int4"),
        (18 * 10**9 - 1, "Qwen/Qwen-7B-Chat-Int4"),
        (18 * 10**9, "Qwen/Qwen-7B-Chat"),
        (80 * 10**9, "Qwen/Qwen-7B-Chat"),
    ],
)
def test_auto_follows_the_memory_of_the_gpu(memory: int | None, expected: str) -> None:
    assert choose_default(cuda_memory=memory) == expected


def test_auto_on_a_gpu_without_a_hub_takes_the_embedded_model_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_hub(*name: object, **options: object) -> None:
        raise HubUnreachable("silent")

    monkeypatch.setattr(qwen.checkpoint, "fetch_snapshot", no_hub)
    monkeypatch.setattr(qwen.checkpoint, "resolve_embedded", lambda **options: tmp_path)
    resolved = resolve_checkpoint("auto", cuda_memory=24 * 10**9)
    assert resolved.folder == tmp_path
    assert resolved.name == "Qwen2.5-Coder-0.5B-Instruct"
    assert "Qwen/Qwen-7B-Chat," in resolved.notices[0]
    assert resolve_checkpoint("auto").notices == ()


# Folders


def write_folder(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"{}")
    return folder


def test_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine", "config.json", "tokenizer.json", "model.safetensors")
    resolved = resolve_checkpoint(str(folder))
    assert (resolved.folder, resolved.name) == (folder, "mine")


def test_folder_without_weights_names_what_it_lacks(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine")
    with pytest.raises(CheckpointNotFound, match=r"config\.json, model\.safetensors, tokenizer"):
        resolve_checkpoint(str(folder))
    write_folder(folder, "config.json", "tokenizer.json", "pytorch_model.bin")
    with pytest.raises(CheckpointDamaged, match=r"lacks model\.safetensors\..*safetensors format"):
        resolve_checkpoint(str(folder))
    write_folder(folder, "model.safetensors")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointDamaged, match=r"lacks tokenizer\.json or vocab\.json"):
        resolve_checkpoint(str(folder))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine", "config.json", "tokenizer.json", "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(CheckpointDamaged, match=r"lacks b\.safetensors"):
        resolve_checkpoint(str(folder))
    for damaged in ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"x": "../../etc/passwd"}}'):
        index.write_text(damaged)
        with pytest.raises(CheckpointDamaged, match=r"index\.json is damaged"):
            resolve_checkpoint(str(folder))


# Whole repositories


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "ms-home"))
    with LocalHub() as server:
        server.add_repository("Owner/Repo", REPOSITORY)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        yield server


def test_repository_brings_only_the_files_that_are_read(hub: LocalHub) -> None:
    reports: list[tuple[str, int, int]] = []

    def report(step: str, *, done: int = 0, total: int = 0, unit: str = "") -> None:
        reports.append((step, done, total))

    resolved = resolve_checkpoint("Owner/Repo", report=report)
    assert resolved.name == "Repo"
    files = {path.name for path in resolved.folder.iterdir()}
    assert files == {"config.json", "tokenizer.json", "model.safetensors"}
    total = sum(len(REPOSITORY[name]) for name in files)
    assert ("Downloading Owner/Repo from Hugging Face", total, total) in reports


def test_repository_comes_from_modelscope_once(hub: LocalHub) -> None:
    hub.add_modelscope_repository("Owner/Repo", REPOSITORY)
    reports: list[int] = []
    resolved = resolve_checkpoint(
        "modelscope:Owner/Repo", report=lambda step, *, done=0, **_: reports.append(done)
    )
    files = {path.name for path in resolved.folder.iterdir() if path.is_file()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= files
    assert not {"pytorch_model.bin", "modeling_own.py"} & files
    assert max(reports) == sum(
        len(REPOSITORY[name]) for name in ("config.json", "tokenizer.json", "model.safetensors")
    )
    asked = len(hub.requests)
    assert resolve_checkpoint("modelscope:Owner/Repo").folder == resolved.folder
    assert len(hub.requests) == asked


def test_cached_snapshot_is_used_without_asking_the_hub(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch_snapshot("Owner/Repo")
    asked = len(hub.requests)
    assert fetch_snapshot("Owner/Repo") == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_snapshot("Owner/Repo", revision=COMMIT) == first
    assert len(hub.requests) == asked


def test_half_snapshot_of_an_older_client_is_completed(hub: LocalHub, tmp_path: Path) -> None:
    """Older clients wrote no list of files, so today's takes whatever is there for whole."""
    repository = tmp_path / "hf" / "models--Owner--Repo"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    write_folder(snapshot, "config.json", "tokenizer.json")
    assert fetch_snapshot("Owner/Repo").folder == snapshot
    assert (snapshot / "model.safetensors").exists()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_unknown_repository_is_not_found(hub: LocalHub, status: int) -> None:
    hub.status = status
    with pytest.raises(CheckpointNotFound, match=r"no checkpoint named Owner/Nope.*HF_TOKEN"):
        fetch_snapshot("Owner/Nope")


def test_unknown_revision_is_not_found(hub: LocalHub) -> None:
    with pytest.raises(CheckpointNotFound, match="at revision v9"):
        fetch_snapshot("Owner/Repo", revision="v9")


def test_unknown_repository_on_modelscope_is_not_found(hub: LocalHub) -> None:
    with pytest.raises(CheckpointNotFound, match=r"ModelScope has no.*MODELSCOPE_API_TOKEN"):
        resolve_checkpoint("modelscope:Owner/Nope")


def test_hub_with_an_error_is_unreachable(hub: LocalHub) -> None:
    hub.status = 503
    with pytest.raises(HubUnreachable, match=r"error 503.*HF_ENDPOINT"):
        fetch_snapshot("Owner/Repo")


def test_silent_hubs_cost_one_wait(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with SilentServer() as silent:
        monkeypatch.setenv("HF_ENDPOINT", silent.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", silent.url)
        with pytest.raises(HubUnreachable, match=r"Hugging Face did not.*ModelScope did not"):
            fetch_snapshot("Qwen/Repo", probe_seconds=1.0)
    assert silent.most_open == 2  # both were waited for at the same time


def test_offline_without_a_snapshot_is_explained(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE"):
        fetch_snapshot("Owner/Repo")
    assert hub.requests == []


def test_repository_with_pickled_weights_only_is_refused(hub: LocalHub) -> None:
    files = {name: REPOSITORY[name] for name in ("config.json", "tokenizer.json")}
    hub.add_repository("Owner/Old", {**files, "pytorch_model.bin": b"pickled"})
    with pytest.raises(CheckpointUnsupported, match="safetensors"):
        fetch_snapshot("Owner/Old")


def test_repository_larger_than_the_disk_is_refused(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskFull, match=r"50\.02 kB more are needed"):
        fetch_snapshot("Owner/Repo")


def test_download_that_breaks_off_is_explained(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = qwen.hub._client_download

    def break_off(*args: Any, **options: Any) -> Path:
        if options.get("local_files_only"):
            return real(*args, **options)
        raise ConnectionError("reset")

    monkeypatch.setattr(qwen.hub, "_client_download", break_off)
    with pytest.raises(HubUnreachable, match=r"broke off \(ConnectionError\)"):
        fetch_snapshot("Owner/Repo")


def test_modelscope_stands_in_for_repositories_of_qwen(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "x", "config.json", "tokenizer.json", "model.safetensors")
    asked: list[str] = []

    def download(which: str, *args: Any, **options: Any) -> Path:
        if options.get("local_files_only"):
            raise FileNotFoundError
        asked.append(which)
        return folder

    monkeypatch.setattr(qwen.hub, "_client_download", download)
    hub.files["/models/Qwen/Repo/resolve/master/config.json"] = b"{}"
    with SilentServer() as silent:
        monkeypatch.setenv("HF_ENDPOINT", silent.url)
        snapshot = fetch_snapshot("Qwen/Repo", probe_seconds=0.5)
        assert asked == ["modelscope"]
        assert "came from ModelScope" in snapshot.notices[0]
        with pytest.raises(HubUnreachable):
            fetch_snapshot("Owner/Repo", probe_seconds=0.5)


# The embedded model


def test_converted_model_is_taken_without_its_gguf_file_or_a_network(tmp_path: Path) -> None:
    carrier = HubFile("huggingface", "Owner/Repo", "x.gguf", "main")
    model = GgufModel("Tiny", DataFile("x.gguf", 1, "0" * 64, (carrier,)), {})
    file = GgufFile(path=tmp_path / "gone", key="0" * 64, name="Tiny")
    folder = converted_folder(file, dtype="bfloat16", cache=tmp_path)
    write_tiny_folder(folder)
    assert resolve_embedded(model=model, cache=tmp_path) == folder
    assert not (tmp_path / "files").exists()
