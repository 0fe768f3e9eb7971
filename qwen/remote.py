"""`OpenAIBackend`: the `ChatBackend` on another server's model, over the OpenAI API.

Knows the `openai` client and how requests, counts and errors fit together. The engine may go away
and come back at any time: a request that fails says so, and the next one asks anew.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import openai

from qwen.backend import BackendInfo, ReportProgress, ignore_progress
from qwen.errors import (
    BackendNotReady,
    EmptyMessage,
    EngineFailed,
    EngineRefused,
    EngineUnreachable,
    PromptTooLong,
    QwenError,
)
from qwen.messages import (
    ChatRequest,
    ContextUsage,
    StreamEvent,
)
from qwen.remote_counting import Fitted, RemoteCounter
from qwen.remote_engines import RemoteModel, choose_models
from qwen.remote_errors import (
    context_full,
    incomplete,
    no_engine,
    retry_pause,
    silent,
    to_qwen_error,
)
from qwen.remote_loop import LoopThread
from qwen.remote_options import RemoteOptions
from qwen.remote_reply import RemoteReply, build_info
from qwen.remote_wire import Chunk, parse_chunk, request_body, request_path

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Texts that the engine counts at the same time.
_COUNTED_AT_ONCE = 8
#: Seconds in which an engine that did not count in time is not asked again.
_COUNTING_PAUSE = 30.0


@dataclass(frozen=True, slots=True)
class RemoteTimes:
    """How long to wait for an engine; all in seconds.

    Attributes:
        connect: For a connection.
        first: For the beginning of a reply: waiting in the engine's queue and reading the prompt.
        silence: Between two pieces of a reply.
        listing: For the model list.
        counting: For the count of a request's tokens, after which it is estimated.
        loading: At start, for an engine that says that it is still loading its model.
    """

    connect: float = 5.0
    first: float = 300.0
    silence: float = 60.0
    listing: float = 10.0
    counting: float = 2.0
    loading: float = 1800.0


DEFAULT_TIMES = RemoteTimes()


@dataclass(frozen=True, slots=True)
class _Served:
    """A model of the engine, and what counts its tokens."""

    model: RemoteModel
    counter: RemoteCounter


class OpenAIBackend:
    """Answers chat requests on a remote engine's model. Every method may run on any thread.

    Args:
        options: Where the engine is.
        max_input_tokens: A smaller budget for prompts; older turns beyond it are dropped.
        times: How long to wait.

    Raises:
        EngineFailed: The engine does not answer, refuses the key or does not have the model.
        BackendNotReady: It is still loading its model.
    """

    def __init__(
        self,
        options: RemoteOptions,
        *,
        max_input_tokens: int | None = None,
        times: RemoteTimes = DEFAULT_TIMES,
    ) -> None:
        self._options = options
        self._times = times
        self._max_input_tokens = max_input_tokens
        self._client = openai.AsyncOpenAI(
            base_url=options.base_url,
            api_key=options.api_key or "none",
            max_retries=0,
            timeout=openai.Timeout(None, connect=times.connect),
            # A proxy for the world outside does not know this machine's own engine.
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not options.is_here),
        )
        self._request: Any = {"headers": _headers(options)}
        self._root = options.base_url.removesuffix("/v1")
        self._closed = threading.Event()
        self._is_stale = False
        self._silent_until = 0.0
        self._loop = LoopThread()
        try:
            self._adopt(self._wait_for(self._fetch_models()))
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> BackendInfo:
        """See `ChatBackend.info`; follows the engine when it comes back with another model."""
        return self._info

    def stream(self, request: ChatRequest, cancel: threading.Event) -> Iterator[StreamEvent]:
        """See `ChatBackend.stream`. Waiting in the engine's queue counts towards the first token.

        Raises:
            PromptTooLong: The engine says that the prompt does not fit.
            EngineFailed: It does not answer, breaks off or fails; after a few attempts where
                nothing had come.
        """
        asked = time.monotonic()
        _check_not_empty(request)
        fitted = self._fit(request)
        yield StreamEvent(context=fitted.usage)
        reply = RemoteReply(asked, fitted.usage.prompt)
        chunks = self._loop_iterate(
            self._chunks(fitted.request, max_tokens=fitted.max_tokens), cancel
        )
        try:
            for chunk in chunks:
                event = reply.add(chunk)
                if event is not None:
                    yield event
        finally:
            chunks.close()
        yield reply.final(cancelled=cancel.is_set() or self._closed.is_set())

    def count_tokens(self, request: ChatRequest) -> ContextUsage:
        """See `ChatBackend.count_tokens`. The figures are estimates, and marked as such."""
        return self._fit(request).usage

    def close(self) -> None:
        """See `ChatBackend.close`."""
        self._closed.set()
        self._loop.close(self._client.close())

    # Talking to the engine: these run on the loop's thread.

    async def _fetch_models(self) -> tuple[RemoteModel, ...]:
        async with asyncio.timeout(self._times.listing):
            try:
                listing = await self._client.get("/models", cast_to=object, options=self._request)
            except openai.NotFoundError:
                if not self._options.model:
                    raise
                return (RemoteModel(self._options.model),)  # a server without a list
        return choose_models(listing, self._options.model)

    async def _chunks(
        self, request: ChatRequest, *, max_tokens: int
    ) -> AsyncGenerator[Chunk, None]:
        """Yield a reply's chunks; begin again after a fault if nothing had come."""
        attempt = 0
        while True:
            attempt += 1
            began = False
            try:
                if self._is_stale:
                    self._adopt(await self._fetch_models())
                body = request_body(request, self._find(request).model, max_tokens=max_tokens)
                async for chunk in self._events(request_path(request), body):
                    began = began or chunk.says_something
                    yield chunk
                return
            except Exception as error:
                problem = to_qwen_error(error)
                if began and isinstance(problem, PromptTooLong):
                    problem = context_full()
                self._is_stale = isinstance(problem, EngineFailed | BackendNotReady)
                pause = None if began else self._pause_after(error, problem, attempt)
                logger.info("The remote engine failed: %s", type(problem).__name__)
                if pause is None:
                    raise problem from None
            await asyncio.sleep(pause)

    def _pause_after(self, error: Exception, problem: QwenError, attempt: int) -> float | None:
        if isinstance(problem, EngineRefused) and isinstance(error, openai.NotFoundError):
            # The engine may have come back with another model; it is asked for its list first.
            return 0.0 if attempt == 1 and not self._options.model else None
        return retry_pause(error, problem, attempt)

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks of one attempt.

        Raises:
            EngineFailed: It ended without a reason to end, fell silent or sent garbage.
            Exception: Of the client.
        """
        limit = self._times.first
        deadline = time.monotonic() + limit
        said = finished = False
        async with await self._open_stream(path, body) as stream:
            events = aiter(stream)
            while True:
                wait = self._times.silence if said else max(deadline - time.monotonic(), 0)
                try:
                    async with asyncio.timeout(wait):
                        data = await anext(events)
                except StopAsyncIteration:
                    break
                except TimeoutError:
                    if finished:
                        break
                    raise silent(self._times.silence if said else limit) from None
                chunk = parse_chunk(data)
                said = said or chunk.says_something
                finished = finished or chunk.finish_reason is not None
                yield chunk
        if not finished:
            raise incomplete(said=said)

    async def _open_stream(self, path: str, body: dict[str, Any]) -> openai.AsyncStream[object]:
        try:
            async with asyncio.timeout(self._times.first):
                return await self._client.post(
                    path,
                    cast_to=object,
                    body=body,
                    options=self._request,
                    stream=True,
                    stream_cls=openai.AsyncStream[object],
                )
        except TimeoutError:
            raise silent(self._times.first) from None

    async def _count(self, model: RemoteModel, texts: Sequence[str]) -> list[int | None]:
        """Count texts at the engine's `/tokenize`, as many as there is time for."""
        counts: list[int | None] = [None] * len(texts)
        turn = asyncio.Semaphore(_COUNTED_AT_ONCE)

        async def count(place: int, text: str) -> None:
            async with turn:
                counts[place] = await self._count_one(model, text)

        try:
            async with asyncio.timeout(self._times.counting), asyncio.TaskGroup() as tasks:
                for place, text in enumerate(texts):
                    tasks.create_task(count(place, text))
        except* (Exception, asyncio.CancelledError):
            self._silent_until = time.monotonic() + _COUNTING_PAUSE
        return counts

    async def _count_one(self, model: RemoteModel, text: str) -> int | None:
        field_name = model.kind.tokenize
        body: dict[str, Any] = {field_name: text}
        if field_name == "prompt":
            body |= {"model": model.id, "add_special_tokens": False}
        answer = await self._client.post(
            f"{self._root}/tokenize", cast_to=object, body=body, options=self._request
        )
        if not isinstance(answer, dict):
            return None
        tokens, count = answer.get("tokens"), answer.get("count")
        if isinstance(count, int):
            return count
        return len(tokens) if isinstance(tokens, list) else None

    # From the threads of callers.

    def _count_there(self, model: RemoteModel, texts: Sequence[str]) -> list[int | None]:
        if time.monotonic() < self._silent_until or self._is_stale:
            return [None] * len(texts)
        try:
            return self._loop.call(self._count(model, texts))
        except CancelledError:
            return [None] * len(texts)

    def _adopt(self, models: Sequence[RemoteModel]) -> None:
        """Take the engine's models; the first answers what names none."""
        self._served = {model.name: _Served(model, self._counter(model)) for model in models}
        self._info = build_info(models)
        self._is_stale = False
        self._silent_until = 0.0

    def _counter(self, model: RemoteModel) -> RemoteCounter:
        return RemoteCounter(partial(self._count_there, model) if model.kind.tokenize else None)

    def _find(self, request: ChatRequest) -> _Served:
        served = self._served
        found = served.get(request.model or next(iter(served)))
        if found is None:
            raise EngineRefused(
                "The engine does not have the model any more that was asked for. Ask for its model "
                "list again and choose another one."
            )
        return found

    def _fit(self, request: ChatRequest) -> Fitted:
        found = self._find(request)
        return found.counter.fit(request, found.model.context_length, self._max_input_tokens)

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._loop.call(work)
        except CancelledError:
            raise _shutting_down() from None
        except Exception as error:
            problem = to_qwen_error(error)
            raise (no_engine() if isinstance(problem, EngineUnreachable) else problem) from None

    def _loop_iterate(self, source: AsyncGenerator[Chunk, None], cancel: threading.Event) -> Any:
        try:
            yield from self._loop.iterate(source, cancel)
        except CancelledError:
            raise _shutting_down() from None


def _shutting_down() -> BackendNotReady:
    return BackendNotReady("The server is shutting down. Start it again to go on.")


def _headers(options: RemoteOptions) -> dict[str, Any]:
    """Return the headers that say who asks.

    Said with every request: else the client sends what it finds in the environment, or refuses to
    send nothing.
    """
    bearer = f"Bearer {options.api_key}" if options.api_key else openai.Omit()
    omitted = dict.fromkeys(("OpenAI-Organization", "OpenAI-Project"), openai.Omit())
    return {"Authorization": bearer, "User-Agent": "qwen-webui", **omitted}


def _check_not_empty(request: ChatRequest) -> None:
    if request.raw_prompt is not None:
        if not (request.raw_prompt + request.reply_prefix):
            raise EmptyMessage("The text to complete is empty. Write something first.")
        return
    last = request.messages[-1] if request.messages else None
    if last is None or (last.role == "user" and not last.content.strip()):
        raise EmptyMessage("The message is empty. Write something first.")


def open_remote(
    options: RemoteOptions,
    *,
    max_input_tokens: int | None = None,
    report: ReportProgress = ignore_progress,
    times: RemoteTimes = DEFAULT_TIMES,
) -> OpenAIBackend:
    """Reach a remote engine; one that is still loading its model is waited for.

    Raises:
        QwenError: As `OpenAIBackend`.
    """
    deadline = time.monotonic() + times.loading
    report("Asking the remote engine for its models")
    while True:
        try:
            return OpenAIBackend(options, max_input_tokens=max_input_tokens, times=times)
        except BackendNotReady:
            if time.monotonic() >= deadline:
                raise
            report("The remote engine is loading its model")
            time.sleep(1.0)
