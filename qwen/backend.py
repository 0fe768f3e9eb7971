"""The one protocol between the doors (page, API, terminal) and whatever answers.

Also `DeferredBackend`, which loads the real backend on a thread of its own so that a page is up at
once. Knows no model library. Source of the shape: simonw/llm and httpx's transports.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from qwen.errors import BackendFailed, BackendNotReady, QwenError
from qwen.messages import ChatRequest, ContextUsage, SamplingParams, StreamEvent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a model takes of a machine's memory, in bytes; estimated before it was loaded.

    Attributes:
        cache: For a conversation of `context` tokens.
        context: Tokens of prompt and reply.
        free: What was free for all of it.
    """

    weights: int
    cache: int
    activations: int
    program: int
    context: int
    free: int


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model that a request may name, and its context in tokens."""

    name: str
    context_length: int


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What a page or an API says about the model behind it.

    Attributes:
        name: As a user knows it, for example "Qwen2.5-Coder-0.5B-Instruct".
        context_length: Tokens of prompt and reply together.
        is_chat: False for a base model, which has no chat template and completes raw text.
        device: For example "cpu" or "cuda:0".
        dtype: For example "bfloat16" or "int4".
        default_params: The checkpoint's own generation settings.
        notices: Sentences about choices made while loading that a user should know.
        memory: None if it is not known.
        other_models: What `ChatRequest.model` may name instead of this one, at a remote engine.
    """

    name: str
    context_length: int
    is_chat: bool = True
    device: str = "cpu"
    dtype: str = "float32"
    default_params: SamplingParams = field(default_factory=SamplingParams)
    notices: tuple[str, ...] = ()
    memory: MemoryUse | None = None
    other_models: tuple[ListedModel, ...] = ()

    @property
    def models(self) -> tuple[ListedModel, ...]:
        """All models that a request may name, this one first."""
        return ListedModel(self.name, self.context_length), *self.other_models


class ChatBackend(Protocol):
    """Whatever answers chat requests. All methods may be called from several threads."""

    @property
    def info(self) -> BackendInfo:
        """Describe the model."""
        ...

    def stream(self, request: ChatRequest, cancel: threading.Event) -> Iterator[StreamEvent]:
        """Answer a request step by step.

        Closing the iterator or setting `cancel` ends the work within one token; with `cancel`
        the last event still comes, with finish reason "cancelled".

        Raises:
            QwenError: At the first step, or later when generation fails midway.
        """
        ...

    def count_tokens(self, request: ChatRequest) -> ContextUsage:
        """Tell how a request would fill the context, without running the model."""
        ...

    def close(self) -> None:
        """Refuse new requests, cancel running ones and free the model's memory."""
        ...


@dataclass(frozen=True, slots=True)
class LoadStatus:
    """How far loading is.

    Attributes:
        stage: "failed" comes with `error`; "ready" is final.
        step: What is being done, fit to show ("Downloading the model from ModelScope").
        done: Finished part of the step in `unit`s; 0 when unknown.
        total: The whole step in `unit`s; 0 when unknown.
        unit: "bytes", or "" for steps without a measure.
        seconds: Since loading began.
    """

    stage: Literal["loading", "ready", "failed"] = "loading"
    step: str = "Starting"
    done: int = 0
    total: int = 0
    unit: str = ""
    seconds: float = 0.0
    error: QwenError | None = None


class ReportProgress(Protocol):
    """A callback that loaders call with what they are doing; cheap, any thread, any rate."""

    def __call__(self, step: str, *, done: int = 0, total: int = 0, unit: str = "") -> None:
        """Report a step and how much of it is done."""
        ...


def ignore_progress(step: str, *, done: int = 0, total: int = 0, unit: str = "") -> None:
    """Report to nobody."""


class DeferredBackend:
    """A `ChatBackend` that loads another one on a background thread.

    Until that is ready, every request raises `BackendNotReady`; when loading failed, it raises
    the error of the failure, and `start` may be called again.

    Args:
        load: Builds the real backend; called with a `ReportProgress`.
        on_status: Called with every change of status, for a progress bar on a terminal.
    """

    def __init__(
        self,
        load: Callable[[ReportProgress], ChatBackend],
        *,
        on_status: Callable[[LoadStatus], None] | None = None,
    ) -> None:
        self._load = load
        self._on_status = on_status
        self._lock = threading.Lock()
        self._status = LoadStatus(stage="failed", step="Not started")
        self._backend: ChatBackend | None = None
        self._started = 0.0
        self._closed = False

    @property
    def status(self) -> LoadStatus:
        """Where loading stands now."""
        status = self._status
        if status.stage != "loading":
            return status
        return replace(status, seconds=time.monotonic() - self._started)

    def start(self) -> None:
        """Begin loading, or begin again after a failure; otherwise do nothing."""
        with self._lock:
            if self._closed or self._status.stage != "failed":
                return
            self._started = time.monotonic()
            self._status = LoadStatus()
        threading.Thread(target=self._run, name="load-model", daemon=True).start()

    def _run(self) -> None:
        try:
            backend = self._load(self._report)
        except Exception as error:
            # A copy: the traceback of the original keeps what was half loaded alive.
            known = copy.copy(_as_qwen_error(error))
            self._set_status(LoadStatus(stage="failed", step="Loading failed", error=known))
            return
        with self._lock:
            self._backend = backend
            closed = self._closed
        if closed:
            backend.close()
            return
        seconds = time.monotonic() - self._started
        self._set_status(LoadStatus(stage="ready", step="Ready", seconds=seconds))

    def _report(self, step: str, *, done: int = 0, total: int = 0, unit: str = "") -> None:
        self._set_status(LoadStatus(step=step, done=done, total=total, unit=unit))

    def _set_status(self, status: LoadStatus) -> None:
        self._status = status
        if self._on_status is None:
            return
        try:
            self._on_status(self.status)
        except Exception:
            # A terminal that went away is no reason to give up loading.
            logger.exception("Showing the progress failed; it is not shown any more")
            self._on_status = None

    def _ready(self) -> ChatBackend:
        backend, status = self._backend, self._status
        if backend is not None:
            return backend
        if status.error is not None:
            raise copy.copy(status.error)  # raised again and again, one object's traceback grows
        raise BackendNotReady("The model is still being loaded. Try again in a moment.")

    @property
    def info(self) -> BackendInfo:
        """Describe the model; raises `BackendNotReady` while there is none."""
        return self._ready().info

    def stream(self, request: ChatRequest, cancel: threading.Event) -> Iterator[StreamEvent]:
        """See `ChatBackend.stream`."""
        return self._ready().stream(request, cancel)

    def count_tokens(self, request: ChatRequest) -> ContextUsage:
        """See `ChatBackend.count_tokens`."""
        return self._ready().count_tokens(request)

    def close(self) -> None:
        """Close the real backend, now or as soon as it has been loaded."""
        with self._lock:
            self._closed = True
            backend = self._backend
        if backend is not None:
            backend.close()


def _as_qwen_error(error: Exception) -> QwenError:
    if isinstance(error, QwenError):
        return error
    logger.error("Loading the model failed", exc_info=error)
    return BackendFailed(
        "The model could not be loaded because of an unexpected fault. The server's log has the "
        "details; start the server again or choose another checkpoint."
    )
