"""The files of a checkpoint that is being quantised: what is done, kept so that a run can go on.

A folder beside the target holds a finished layer in a file of its own, the hidden states before the
next one, and what they were made from and how. Another source or another option makes another
fingerprint, and the work starts anew. Knows no solver.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen.backend import ReportProgress
from qwen.checkpoint_files import weight_files
from qwen.convert_map import PlannedTensor, StoredTensor
from qwen.convert_weights import write_weights
from qwen.errors import InvalidRequest

_STATE = "quantizing.json"
_LOCK = "quantizing.lock"
_WORK = "layers"
_HIDDEN = "hidden.safetensors"
_TUNED = "-tuned.safetensors"
#: Files of the source that say the same of the target. Code is copied, never run.
_KEPT = (
    "*.json",
    "*.txt",
    "*.tiktoken",
    "*.jinja",
    "*.model",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "Notice*",
)
_REPLACED = ("config.json", "quantize_config.json", "model.safetensors.index.json")


def read_file_header(path: Path) -> dict[str, StoredTensor]:
    """Read dtypes and shapes of a file's tensors, in the order of their names."""
    found = {}
    with safe_open(path, framework="pt") as opened:
        for name in sorted(opened.keys()):
            tensor = opened.get_slice(name)
            found[name] = StoredTensor(path.name, tensor.get_dtype(), tuple(tensor.get_shape()))
    return found


def fingerprint(folder: Path, options: Mapping[str, Any]) -> str:
    """Return a sum over what a source holds and how it is quantised.

    Of the weights the sizes and times count, not the contents: reading them all takes minutes.
    """
    files = {}
    for name in weight_files(folder):
        status = (folder / name).stat()
        files[name] = [status.st_size, status.st_mtime_ns]
    config = (folder / "config.json").read_text(encoding="utf-8")
    text = json.dumps([config, files, dict(options)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class WorkFolder:
    """What is done of a quantisation, on disk.

    Args:
        folder: Beside the target; made if it is not there.
        key: From `fingerprint`. What was done under another one is removed.
    """

    def __init__(self, folder: Path, *, key: str) -> None:
        self.folder = folder
        self._work = folder / _WORK
        state = folder / _STATE
        found = self._found(state)
        self.starts_anew = found is not None and found != key
        if found != key:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != _LOCK:
                    path.unlink()
        self._work.mkdir(parents=True, exist_ok=True)
        if found != key:
            _replace(state, lambda path: path.write_text(json.dumps({"fingerprint": key}) + "\n"))

    def _found(self, state: Path) -> str | None:
        """Return the fingerprint of earlier work; None without any, "" if it cannot be read."""
        if not state.is_file():
            return None
        try:
            return str(json.loads(state.read_text(encoding="utf-8"))["fingerprint"])
        except (ValueError, LookupError, TypeError):
            return ""

    def layers_done(self) -> int:
        """Return how many layers are done, from the first on without a gap."""
        done = 0
        while self._layer(done).is_file():
            done += 1
        return done

    def write_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a finished layer; it is there whole or not at all."""
        _replace(self._layer(index), lambda path: _save(tensors, path))

    def write_rest(self, tensors: Mapping[str, Tensor]) -> None:
        """Write what belongs to no layer."""
        _replace(self._rest, lambda path: _save(tensors, path))

    def write_hidden(self, hidden_states: Tensor, *, layer: int) -> None:
        """Write what a layer will read; to be done before the layer below it is written."""
        _replace(self._hidden(layer), lambda path: _save({"hidden": hidden_states}, path))

    def forget_hidden(self, *, layer: int) -> None:
        """Remove what a layer has read."""
        self._hidden(layer).unlink(missing_ok=True)

    def read_hidden(self, *, layer: int) -> Tensor | None:
        """Read what a layer reads; None if it is not kept."""
        path = self._hidden(layer)
        return load_file(path)["hidden"] if path.is_file() else None

    def read(self, name: str, *, layer: int | None) -> Tensor | None:
        """Read a tensor of a finished layer, or with None of the rest; None if it has none."""
        path = self._rest if layer is None else self._layer(layer)
        with safe_open(path, framework="pt") as opened:
            return opened.get_tensor(name).clone() if name in opened.keys() else None  # noqa: SIM118

    def write_note(self, note: Any) -> None:
        """Keep what a run decided before its first layer, as JSON."""
        _replace(self._note, lambda path: path.write_text(json.dumps(note) + "\n"))

    def read_note(self) -> Any:
        """Read that; None if nothing was decided yet."""
        return json.loads(self._note.read_text()) if self._note.is_file() else None

    def tuned_done(self, key: str) -> bool:
        """Tell whether tensors were tuned under this key; forget those of another one."""
        for path in self._work.glob(f"*{_TUNED}"):
            if path != self._tuned(key):
                path.unlink()
        return self._tuned(key).is_file()

    def write_tuned(self, tensors: Mapping[str, Tensor], *, key: str) -> None:
        """Write what takes the place of tensors of the layers and of the rest."""
        _replace(self._tuned(key), lambda path: _save(tensors, path))

    def _tuned(self, key: str) -> Path:
        return self._work / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}{_TUNED}"

    @property
    def _note(self) -> Path:
        return self._work / "decided.json"

    @property
    def _rest(self) -> Path:
        return self._work / "rest.safetensors"

    def _hidden(self, layer: int) -> Path:
        return self._work / f"{layer:05}-{_HIDDEN}"

    def _layer(self, index: int) -> Path:
        return self._work / f"layer-{index:05}.safetensors"

    def assemble(
        self, *, layers: int, max_shard_bytes: int, report: ReportProgress
    ) -> tuple[int, int]:
        """Write the weight files from the parts; return how many tensors and bytes they hold."""
        stored: dict[str, StoredTensor] = {}
        parts = [self._rest, *(self._layer(index) for index in range(layers))]
        for path in (*parts, *self._work.glob(f"*{_TUNED}")):  # the last one counts
            stored |= read_file_header(path)
        plan = [
            PlannedTensor(name, (name,), tensor.dtype, tensor.shape, lambda read: read[0])
            for name, tensor in stored.items()
        ]
        write_weights(
            plan, stored, self._work, self.folder, max_shard_bytes=max_shard_bytes, report=report
        )
        return len(plan), sum(tensor.size for tensor in plan)

    def finish(self, target: Path) -> None:
        """Give the folder its final name; only what belongs to a checkpoint is left in it."""
        shutil.rmtree(self._work)
        (self.folder / _STATE).unlink()
        (self.folder / _LOCK).unlink(missing_ok=True)
        if target.exists():
            target.rmdir()  # empty; not every system replaces a folder
        self.folder.rename(target)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a work folder against other processes; one that ends lets it go.

    Raises:
        InvalidRequest: Another process holds it, or it holds something else.
    """
    from filelock import FileLock, Timeout

    ours = (_STATE, _LOCK)
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / n).exists() for n in ours):
        raise InvalidRequest(
            f"{folder} is there and is not the work of an earlier quantisation. Remove it, or name "
            "another target."
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InvalidRequest(
            f"Another process is quantising into {folder}. Wait for it, or name another target."
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_papers(source: Path, folder: Path, papers: Mapping[str, Mapping[str, Any]]) -> None:
    """Copy tokenizer, generation settings and licence; write what is new, as JSON."""
    replaced = {*papers, *_REPLACED}
    for path in sorted({path for pattern in _KEPT for path in source.glob(pattern)}):
        if path.name not in replaced and path.is_file():
            shutil.copyfile(path, folder / path.name)
    for name, content in papers.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside and rename it, so that a crash leaves none that is cut short."""
    beside = path.with_name(path.name + ".new")
    write(beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
