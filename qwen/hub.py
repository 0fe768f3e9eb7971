"""The two hubs: their addresses, whether they answer, and whole repositories from them.

Respects HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN as
the hubs' own clients do. Those clients retry for minutes, so a hub is probed here before one is
called. Knows no model format; no code of a repository is fetched or run.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from qwen.backend import ReportProgress, ignore_progress
from qwen.carriers import Hub
from qwen.checkpoint_files import missing_files
from qwen.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointUnsupported,
    HubUnreachable,
)
from qwen.weights_cache import disk_full_explained, require_space

logger = logging.getLogger(__name__)

#: Seconds that all silent hubs may cost together; the requirement is 5, the rest is margin.
PROBE_SECONDS = 4.0

HUB_NAMES: dict[Hub, str] = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}

_DEFAULT_REVISIONS: dict[Hub, str] = {"huggingface": "main", "modelscope": "master"}
_TRUE_WORDS = {"1", "ON", "YES", "TRUE"}
_WANTED_FILES = ["*.json", "*.jinja", "merges.txt", "*.tiktoken", "*.model", "*.safetensors"]
_IN_SUBFOLDERS = ["*/*"]
_ADVICE = (
    "Check the network or a proxy's settings, set HF_ENDPOINT to a mirror, name a folder on this "
    "machine, or use the checkpoint 'auto'."
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository's files on disk, and what a user should know about where they came from."""

    folder: Path
    notices: tuple[str, ...] = ()


def hub_endpoint(hub: Hub) -> str:
    """Return a hub's address without a slash at its end."""
    if hub == "huggingface":
        return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    address = os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
    return (address if "://" in address else f"https://{address}").rstrip("/")


def is_offline(hub: Hub) -> bool:
    """Tell whether the user forbids asking a hub."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if hub == "huggingface" else ()
    return any(os.environ.get(name, "").upper() in _TRUE_WORDS for name in names)


def hub_headers(hub: Hub) -> dict[str, str]:
    """Return the headers that identify the user to a hub, from its token."""
    token: str | None = os.environ.get("MODELSCOPE_API_TOKEN")
    if hub == "huggingface":
        from huggingface_hub import get_token

        token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def file_url(hub: Hub, repository: str, revision: str, path: str) -> str:
    """Return the address of one file of a repository."""
    models = "models/" if hub == "modelscope" else ""
    return f"{hub_endpoint(hub)}/{models}{repository}/resolve/{revision}/{path}"


class Probe:
    """A question to a server that is already on its way, on a thread of its own.

    The thread is a daemon: a name service that hangs cannot be interrupted, only left behind.

    Args:
        url: Is asked for its first byte, redirects included.
        headers: Further headers.
    """

    def __init__(self, url: str, *, headers: dict[str, str]) -> None:
        self._url = url
        self._headers = {**headers, "Range": "bytes=0-0"}
        self._answer: SimpleQueue[int | str] = SimpleQueue()
        threading.Thread(target=self._run, name="probe-hub", daemon=True).start()

    def _run(self) -> None:
        try:
            import httpx

            with httpx.stream(
                "GET",
                self._url,
                headers=self._headers,
                follow_redirects=True,
                timeout=PROBE_SECONDS,
            ) as response:
                self._answer.put(response.status_code)
        except Exception as error:
            self._answer.put(f"{type(error).__name__}: {error}")

    def status(self, *, deadline: float) -> int | None:
        """Return the HTTP status, or None when there is none by the deadline or the link failed.

        Args:
            deadline: On the clock of `time.monotonic`.
        """
        try:
            answer = self._answer.get(timeout=max(deadline - time.monotonic(), 0.001))
        except Empty:
            answer = "no answer in time"
        self._answer.put(answer)
        if isinstance(answer, str):
            logger.info("%s: %s", self._url, answer)
            return None
        return answer


def fetch_snapshot(
    repository: str,
    *,
    revision: str | None = None,
    hub: Hub = "huggingface",
    probe_seconds: float = PROBE_SECONDS,
    report: ReportProgress = ignore_progress,
) -> Snapshot:
    """Return the folder of a hub's repository, from the hub client's cache if it is whole there.

    A cached snapshot is taken without asking the hub. A repository of the owner `Qwen` is the
    same on both hubs, so ModelScope stands in when Hugging Face does not answer.

    Args:
        repository: OWNER/NAME.
        revision: Branch, tag or commit; None is the hub's default branch.
        hub: Which hub the name is meant for.
        probe_seconds: How long silent hubs may keep us, all together.
        report: Is told what is being done.

    Raises:
        CheckpointNotFound: The hub has no such repository or revision, or does not show it.
        CheckpointUnsupported: The repository has no safetensors weights.
        HubUnreachable: No hub answered and nothing is cached.
        DiskFull: There is no room for the files.
    """
    hubs = _hubs_of(repository, revision, hub)
    folder = find_snapshot(repository, revision=revision, hub=hub)
    if folder is not None:
        return Snapshot(folder)
    if all(is_offline(candidate) for candidate in hubs):
        raise HubUnreachable(
            f"{repository} is not on this machine, and HF_HUB_OFFLINE forbids fetching it. Unset "
            "HF_HUB_OFFLINE, name a folder on this machine, or use the checkpoint 'auto'."
        )
    report(f"Looking for {repository}")
    answering = _first_answering(hubs, repository, revision, probe_seconds)
    notices: tuple[str, ...] = ()
    if answering != hub:
        notices = (f"{HUB_NAMES[hub]} did not answer; {repository} came from ModelScope.",)
    return Snapshot(_download(answering, repository, revision, report), notices)


def find_snapshot(
    repository: str, *, revision: str | None = None, hub: Hub = "huggingface"
) -> Path | None:
    """Return the folder that `fetch_snapshot` would take without asking a hub, or None."""
    found = (_cached(h, repository, revision) for h in _hubs_of(repository, revision, hub))
    return next((folder for folder in found if folder is not None), None)


def fetch_config(
    repository: str,
    *,
    revision: str | None = None,
    hub: Hub = "huggingface",
    probe_seconds: float = PROBE_SECONDS,
) -> dict[str, Any]:
    """Return a repository's config.json and fetch nothing else; arguments as `fetch_snapshot`.

    Raises:
        CheckpointNotFound: The hub has no such repository or revision, or does not show it.
        CheckpointDamaged: The file is no JSON object.
        HubUnreachable: No hub answered, or not in time.
    """
    import httpx

    hubs = tuple(h for h in _hubs_of(repository, revision, hub) if not is_offline(h))
    answering = _first_answering(hubs, repository, revision, probe_seconds)
    at = revision or _DEFAULT_REVISIONS[answering]
    url = file_url(answering, repository, at, "config.json")
    try:
        answer = httpx.get(
            url, headers=hub_headers(answering), follow_redirects=True, timeout=probe_seconds
        ).raise_for_status()
    except httpx.HTTPError as error:
        raise _explained(answering, repository, revision, error) from error
    try:
        values = answer.json()
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointDamaged(f"The config.json of {repository} is not the JSON it should be.")
    return values


def _hubs_of(repository: str, revision: str | None, hub: Hub) -> tuple[Hub, ...]:
    if hub == "huggingface" and repository.startswith("Qwen/") and revision is None:
        return ("huggingface", "modelscope")
    return (hub,)


def _first_answering(
    hubs: tuple[Hub, ...], repository: str, revision: str | None, seconds: float
) -> Hub:
    """Return the first hub that has a repository; all are asked at the same time."""
    deadline = time.monotonic() + seconds
    probes = {
        hub: Probe(
            file_url(hub, repository, revision or _DEFAULT_REVISIONS[hub], "config.json"),
            headers=hub_headers(hub),
        )
        for hub in hubs
        if not is_offline(hub)
    }
    reasons = []
    for hub, probe in probes.items():
        status = probe.status(deadline=deadline)
        if status in (200, 206):
            return hub
        if status in (401, 403, 404):
            raise _not_found(hub, repository, revision)
        answer = "did not answer" if status is None else f"answered with the error {status}"
        reasons.append(f"{HUB_NAMES[hub]} {answer}")
    raise HubUnreachable(f"{repository} cannot be fetched: {'; '.join(reasons)}. {_ADVICE}")


def _not_found(hub: Hub, repository: str, revision: str | None) -> CheckpointNotFound:
    at = f" at revision {revision}" if revision else ""
    token = "HF_TOKEN" if hub == "huggingface" else "MODELSCOPE_API_TOKEN"
    return CheckpointNotFound(
        f"{HUB_NAMES[hub]} has no checkpoint named {repository}{at}, or does not show it without "
        f"leave. Check the spelling; for a private or gated repository set {token} to a token "
        "that may read it."
    )


def _cached(hub: Hub, repository: str, revision: str | None) -> Path | None:
    """Return a snapshot that the hub's client has on disk in whole, or None."""
    if hub == "modelscope" and not _modelscope_cache().exists():
        return None  # spares the second that importing its client takes
    try:
        folder = _client_download(hub, repository, revision, local_files_only=True)
    except Exception as error:
        logger.debug("%s is not in the cache of %s: %s", repository, hub, error)
        return None
    return folder if folder.is_dir() and not missing_files(folder) else None


def _download(hub: Hub, repository: str, revision: str | None, report: ReportProgress) -> Path:
    """Fetch a repository with its hub's client, with our errors."""
    step = f"Downloading {repository} from {HUB_NAMES[hub]}"
    report(step)
    home = _client_cache(hub)
    try:
        with disk_full_explained(home, 0):
            total = _expected_bytes(hub, repository, revision, home)
            counter = _ByteCounter(lambda done: report(step, done=done, total=total, unit="bytes"))
            folder = _client_download(hub, repository, revision, counter=counter)
    except Exception as error:
        raise _explained(hub, repository, revision, error) from error
    if not any(folder.glob("*.safetensors")):
        raise CheckpointUnsupported(
            f"{repository} has no weights in the safetensors format, and no other is read from a "
            "hub because pickled weights can run code. Convert it, or choose another checkpoint."
        )
    return folder


def _explained(hub: Hub, repository: str, revision: str | None, error: Exception) -> Exception:
    """Return a hub client's exception as one of ours."""
    from qwen.errors import QwenError

    if isinstance(error, QwenError):
        return error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return _not_found(hub, repository, revision)
    logger.warning("Downloading %s failed", repository, exc_info=error)
    return HubUnreachable(
        f"The download of {repository} from {HUB_NAMES[hub]} broke off ({type(error).__name__}). "
        f"Start again to go on where it stopped. {_ADVICE}"
    )


def _client_cache(hub: Hub) -> Path:
    """Return an existing folder on the disk that a hub's client writes to."""
    if hub == "huggingface":
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = Path(HF_HUB_CACHE)
    else:
        folder = _modelscope_cache()
    folder = folder.expanduser().absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _modelscope_cache() -> Path:
    return Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope")


def _expected_bytes(hub: Hub, repository: str, revision: str | None, home: Path) -> int:
    """Return how many bytes a download will take, having checked that there is room."""
    if hub != "huggingface":
        return 0
    from huggingface_hub import snapshot_download

    files = snapshot_download(
        repository,
        revision=revision,
        endpoint=hub_endpoint(hub),
        allow_patterns=_WANTED_FILES,
        ignore_patterns=_IN_SUBFOLDERS,
        tqdm_class=_quiet_progress(_ByteCounter(lambda _: None)),
        dry_run=True,
    )
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    require_space(home, needed)
    return needed


class _ByteCounter:
    """Adds up the bytes of files that are fetched by several threads."""

    def __init__(self, on_change: Callable[[int], None]) -> None:
        self._on_change = on_change
        self._lock = threading.Lock()
        self._done = 0

    def add(self, count: float) -> None:
        """Count further bytes."""
        with self._lock:
            self._done += int(count)
            done = self._done
        self._on_change(done)


def _client_download(
    hub: Hub,
    repository: str,
    revision: str | None,
    *,
    counter: _ByteCounter | None = None,
    local_files_only: bool = False,
) -> Path:
    """Call a hub's own client for the files that we read, and no others."""
    counter = counter or _ByteCounter(lambda _: None)
    options: dict[str, Any] = {
        "revision": revision,
        "endpoint": hub_endpoint(hub),  # ModelScope's client would keep the first one it saw
        "allow_patterns": _WANTED_FILES,
        "ignore_patterns": _IN_SUBFOLDERS,
        "local_files_only": local_files_only,
        "max_workers": 4,
    }
    if hub == "huggingface":
        from huggingface_hub import snapshot_download

        progress = _quiet_progress(counter)
        return Path(snapshot_download(repository, tqdm_class=progress, **options))
    from modelscope.hub.snapshot_download import snapshot_download as modelscope_download

    callbacks = [_modelscope_progress(counter)]
    return Path(modelscope_download(repository, progress_callbacks=callbacks, **options))


def _quiet_progress(counter: _ByteCounter) -> type:
    """Return a tqdm class that draws nothing and counts the bytes written to disk."""
    from tqdm.auto import tqdm

    base: Any = tqdm

    class QuietProgress(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._counts = kwargs.get("unit") == "B" and "Reconstructing" in kwargs.get("desc", "")
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts and n:
                counter.add(n)
            super().update(n)

    return QuietProgress


def _modelscope_progress(counter: _ByteCounter) -> type:
    """Return a progress callback class of ModelScope's client that counts bytes."""
    from modelscope.hub.callback import ProgressCallback

    base: Any = ProgressCallback

    class QuietProgress(base):  # type: ignore[misc]
        def update(self, size: int) -> None:
            counter.add(size)

    return QuietProgress
