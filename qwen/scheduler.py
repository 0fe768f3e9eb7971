"""The one decode loop: sequences of many users join and leave it between two steps.

Each step reads one token of every reply that is being written and, beside it, so much of waiting
prompts that no reply pauses for long. Weights are read once for all of them. Requests wait in the
order in which they came, within `ServingLimits`. Knows no tokenizer and no text.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from qwen.attempt import attempt
from qwen.errors import (
    BackendFailed,
    BackendNotReady,
    OutOfMemory,
    QwenError,
)
from qwen.messages import FinishReason, QueuePlace
from qwen.proposals import Proposals, propose
from qwen.readers import Readers
from qwen.reply_steps import EngineStep, Request
from qwen.sequence import SequenceState, prefill_chunk
from qwen.serving_pace import Pace
from qwen.step_plan import Running, plan_step
from qwen.waiting_line import WaitingLine

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds that the interpreter's end waits for a step to end.
_END_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Terms:
    """What the loop is held to.

    Attributes:
        max_running: Sequences at a time.
        max_waiting: Requests behind them.
        cache_bytes: Of keys and values; 0 is no bound.
        eos: Tokens that end a reply.
        ntk_alpha: See `SequenceState`.
        is_strict: Read every sequence by itself, in the pieces in which it would be read alone.
    """

    max_running: int
    max_waiting: int
    cache_bytes: int
    eos: frozenset[int]
    ntk_alpha: Callable[[int], int] | None
    is_strict: bool


class Scheduler:
    """Runs requests. `submit`, `watch` and `close` may be called from any thread.

    The loop has a thread of its own while there is work, and none otherwise.

    Args:
        readers: Of the model.
        terms: See `Terms`.
    """

    def __init__(self, readers: Readers, terms: Terms) -> None:
        self._readers: Readers | None = readers
        self._terms = terms
        self._reads_alone = not readers.can_batch or (terms.is_strict and not readers.is_exact)
        self._lock = threading.RLock()  # the garbage collector may close an iterator in here
        self._pace = Pace()
        self._waiting = WaitingLine(terms.max_waiting, self._pace)
        self._starting: list[Request] = []  # neither waits nor runs yet
        self._running: list[Running] = []
        self._undelivered: list[tuple[Request, EngineStep | QwenError]] = []
        self._ahead: list[tuple[Running, Tensor]] = []  # whose latest token the device has read
        self._thread: threading.Thread | None = None
        self._is_closed = False
        atexit.register(_end_loop, weakref.ref(self))

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run and that wait."""
        with self._lock:
            return len(self._running) + len(self._starting), len(self._waiting)

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises:
            BackendNotReady: After `close`.
            TooManyRequests: As many wait as may.
        """
        with self._lock:
            self.watch()
            if self._is_closed:
                raise BackendNotReady("The server is shutting down. Start it again to go on.")
            self._waiting.leave(self._is_over)
            num_running = len(self._running) + len(self._starting)
            free = self._terms.max_running - num_running
            self._waiting.join(request, free=free, num_running=num_running)
            if self._thread is None:
                self._start_thread()

    def watch(self) -> None:
        """See to it that the loop runs: if its thread has died, say so to all that it ran."""
        with self._lock:
            if self._thread is not None and not self._thread.is_alive():
                logger.error("The decode loop's thread has died; it is started anew")
                self._bury()

    def close(self) -> None:
        """Refuse new requests, cancel the others within one step, let go of the model."""
        with self._lock:
            self._is_closed = True
            if self._readers is not None:
                self._readers.shrink(0)
            if self._thread is None:
                self._readers = None

    def end(self) -> None:
        """Close, and wait a moment for the loop's thread."""
        self.close()
        thread = self._thread
        if thread is not None:
            thread.join(_END_SECONDS)

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._run, name="decode-loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._in_loop():
                while self._has_work():
                    self._step()
        except BaseException as error:
            logger.critical("The decode loop failed; it is started anew", exc_info=error)
        else:
            return
        with self._lock:
            self._bury()

    @contextmanager
    def _in_loop(self) -> Iterator[None]:
        """Do what the loop does: no gradients, the model's GPU the thread's own."""
        assert self._readers is not None
        device = self._readers.device
        with (
            torch.inference_mode(),
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
        ):
            yield

    def _has_work(self) -> bool:
        """Tell whether the loop goes on; if not, its thread is no longer the loop's."""
        with self._lock:
            if self._running or self._starting or self._waiting:
                return True
            self._thread = None
            if self._is_closed and self._readers is not None:
                self._readers.shrink(0)
                self._readers = None
            return False

    def _bury(self) -> None:
        """After the loop's end in an error: tell those it ran, start it again for the others."""
        self._deliver()
        ended, self._running = self._running, []
        running = [*self._starting, *(each.request for each in ended if each.ending is None)]
        self._starting, self._ahead, self._thread = [], [], None
        attempt(lambda: self._let_go(ended))
        for each in ended:
            if each.ending is not None:
                each.request.put(EngineStep(finish_reason=each.ending))
        for request in running:
            request.put(
                BackendFailed(
                    "Generating stopped because of an unexpected fault. The server's log has the "
                    "details; the model is ready again: try again."
                )
            )
        if self._waiting:
            self._start_thread()
        elif self._is_closed:
            self._readers = None

    def _let_go(self, ended: Sequence[Running]) -> None:
        """Let go of sequences that end unfinished, and of all that is kept."""
        if self._readers is not None:
            with self._in_loop():
                for each in ended:
                    attempt(partial(each.state.close, keep=False))
                self._readers.shrink(0)

    def _step(self) -> None:
        """Let requests go and come, read, and choose tokens."""
        readers = self._readers
        assert readers is not None
        for running in [r for r in self._running if self._is_over(r.request)]:
            self._end(running, running.ending or "cancelled")
        self._admit(readers)
        began, num_tokens = time.monotonic(), len(self._ahead)
        ahead, self._ahead = self._ahead, []
        self._choose([pair for pair in ahead if pair[0] in self._running], readers)
        for group in self._plan(readers):
            num_tokens += sum(size for _, size in group)
            if any(size > 1 for _, size in group):
                self._deliver()  # the host has much to do for a prompt
            read = self._read(readers, group)
            self._deliver()  # a GPU reads meanwhile
            self._choose(read, readers)
        is_reading = readers.can_batch and readers.device.type == "cuda" and self._running
        if self._ahead or not is_reading:
            self._deliver()
        if num_tokens:
            self._pace.note_step(num_tokens, time.monotonic() - began)

    def _deliver(self) -> None:
        """Hand callers what their requests have got, which wakes up their threads."""
        for request, step in self._undelivered:
            request.put(step)
        self._undelivered.clear()

    def _is_over(self, request: Request) -> bool:
        return self._is_closed or request.is_cancelled

    def _admit(self, readers: Readers) -> None:
        """Let those who wait begin, in their order, as far as there is room."""
        with self._lock:
            self._waiting.leave(self._is_over)
            while request := self._waiting.call(lambda first: self._has_room(first, readers)):
                self._starting.append(request)
            self._waiting.tell_places(len(self._running) + len(self._starting))
        while self._starting:
            self._begin(self._starting[0], readers)

    def _has_room(self, request: Request, readers: Readers) -> bool:
        """Tell whether a request can begin; lets go of kept sequences that are in its way."""
        running = [*(r.request for r in self._running), *self._starting]
        if len(running) >= self._terms.max_running:
            return False
        if not self._terms.cache_bytes:
            return True
        free = self._terms.cache_bytes - sum(r.nbytes for r in running) - request.nbytes
        if free < 0 and running:
            return False
        readers.shrink(max(free, 0))
        return True

    def _begin(self, request: Request, readers: Readers) -> None:
        request.started_at = time.monotonic()
        if request.position:
            request.put(EngineStep(queued=QueuePlace(0, 0.0)))
        alpha = self._terms.ntk_alpha
        expected = len(request.ids) + request.max_tokens
        state, failure = _with_memory(
            readers,
            lambda: SequenceState(
                readers, request.ids, request.params, expected=expected, ntk_alpha=alpha
            ),
        )
        with self._lock:
            self._starting.remove(request)
            if state is None:
                assert failure is not None
                request.put(failure)
                return
            self._running.append(Running(request, state, quantum=prefill_chunk(readers.device)))

    def _plan(self, readers: Readers) -> list[list[tuple[Running, int]]]:
        """Choose what is read in this step: groups, each at once, of sequences and tokens."""
        chunk = budget = prefill_chunk(readers.device)
        if len(self._running) > 1 and readers.device.type == "cpu" and not self._terms.is_strict:
            num_replies = sum(running.state.num_unread == 1 for running in self._running)
            budget = min(chunk, self._pace.prompt_tokens(num_replies))
        replies, prompts = plan_step(
            self._running, chunk=chunk, budget=budget, is_exact=readers.is_exact
        )
        self._take_turns(prompts, chunk)
        group = [*replies, *prompts]
        return [[each] for each in group] if self._reads_alone else [group] if group else []

    def _take_turns(self, pieces: Sequence[tuple[Running, int]], chunk: int) -> None:
        with self._lock:
            for running, size in pieces:
                running.quantum -= size
                if running.quantum <= 0:
                    running.quantum = chunk
                    self._running.remove(running)
                    self._running.append(running)

    def _read(
        self, readers: Readers, group: Sequence[tuple[Running, int]]
    ) -> list[tuple[Running, Tensor]]:
        """Read the next tokens of sequences; returns those whose next token can be chosen."""
        readings = [
            running.state.reading(size, is_last=running.ending is not None)
            for running, size in group
        ]
        logits, failure = _with_memory(readers, lambda: readers.read(readings))
        if logits is not None:
            for running, _ in group:
                if running.ending is not None:
                    self._end(running, running.ending)
            pairs = zip(group, logits, strict=True)
            return [(running, own) for (running, _), own in pairs if own is not None]
        assert failure is not None
        if len(group) == 1:
            self._fail(group[0][0], failure)
            return []
        # One of them may be the culprit: each by itself, so that the others go on. First the
        # longest one: where it is it that needs more memory, others have none before it has left.
        alone: list[tuple[Running, Tensor]] = []
        for each in sorted(group, key=lambda pair: -pair[0].state.num_tokens):
            alone += [(running, own.clone()) for running, own in self._read(readers, [each])]
        return alone

    def _choose(self, read: Sequence[tuple[Running, Tensor]], readers: Readers) -> None:
        """Choose the next token of every sequence that was read to its end."""
        going_on = []
        for running, logits in read:
            if self._is_over(running.request):
                self._end(running, "cancelled")
            else:
                going_on.append((running, running.state.sampler, logits))
        # On a CPU each by itself: some sums depend on how many rows there are.
        proposals, failures = propose(going_on, by_kind=readers.device.type == "cuda")
        for running, error in failures:
            self._fail(running, error)
        if not proposals:
            return
        # The one place where a GPU is waited for.
        chosen = Proposals(proposals)
        ahead = self._read_ahead(chosen, readers)
        for running, values in chosen:
            is_ahead = running in ahead
            _, failure = attempt(partial(self._accept, running, values, readers, is_ahead))
            if failure is not None:
                self._fail(running, failure)
            elif is_ahead and running in self._running and not running.state.num_unread:
                self._ahead.append((running, ahead[running]))

    def _read_ahead(self, chosen: Proposals[Running], readers: Readers) -> dict[Running, Tensor]:
        """Have a GPU read what was chosen before the host knows it; returns the logits.

        Not what will be the last token of its reply. What cannot be read so is read in the next
        step, and no more of its reply is read ahead.
        """
        read_ahead = readers.read_ahead
        places = [place for place, running in enumerate(chosen.owners) if running.can_read_ahead]
        if self._reads_alone or read_ahead is None or not places:
            return {}
        owners = [chosen.owners[place] for place in places]
        sequences = [running.state.reader for running in owners]
        logits, _ = attempt(lambda: read_ahead(sequences, chosen.tokens(), places))
        if logits is not None:
            return dict(zip(owners, logits, strict=True))
        logger.warning("These replies go on, but nothing more of them is read ahead")
        for running in owners:
            running.is_read_ahead = False
        return {}

    def _accept(
        self, running: Running, values: Sequence[float], readers: Readers, is_ahead: bool
    ) -> None:
        request, choice = running.request, running.state.sampler.accept(values)
        if is_ahead:
            running.state.reader.note([choice.token_id])
        if choice.token_id in self._terms.eos:
            self._finish(running, "stop", choice.token_id, readers)
            return
        request.num_tokens += 1
        step = EngineStep(
            token_id=choice.token_id, logprob=choice.logprob, top_logprobs=choice.top_logprobs
        )
        self._undelivered.append((request, step))
        if request.num_tokens == request.max_tokens:
            self._finish(running, "length", choice.token_id, readers)
        else:
            self._append(running.state, choice.token_id, readers)

    def _append(self, state: SequenceState, token_id: int, readers: Readers) -> None:
        """Have a token be read next, or all of them anew where their alpha has grown."""
        state.append(token_id)
        if state.has_outgrown_alpha:
            _, failure = _with_memory(readers, lambda: state.start(readers))
            if failure is not None:
                raise failure

    def _finish(self, running: Running, reason: FinishReason, last: int, readers: Readers) -> None:
        """End a reply, once its last token is read where the conversation's next prompt gains."""
        if readers.keeps_replies:
            running.ending = reason
            self._append(running.state, last, readers)
            if running.state.num_unread == 1:
                return
        self._end(running, reason)

    def _end(self, running: Running, reason: FinishReason) -> None:
        self._undelivered.append((running.request, EngineStep(finish_reason=reason)))
        self._leave(running, keep=True)
        self._pace.note_turn(time.monotonic() - running.request.started_at)

    def _fail(self, running: Running, failure: QwenError) -> None:
        step = EngineStep(finish_reason=running.ending) if running.ending else failure
        self._undelivered.append((running.request, step))
        self._leave(running, keep=False)  # numbers that are none would spoil the next reply
        if isinstance(failure, OutOfMemory) and self._readers is not None:
            self._readers.shrink(0)

    def _leave(self, running: Running, *, keep: bool) -> None:
        with self._lock:
            if running in self._running:
                self._running.remove(running)
        _, failure = attempt(partial(running.state.close, keep=keep))
        if failure is not None:
            logger.warning("A sequence that ended could not be kept for reuse")
        if self._readers is not None and self._readers.device.type == "cuda" and not self._running:
            self._deliver()  # the GPU may still read ahead
            attempt(torch.cuda.empty_cache)  # raises after an error that the GPU does not forget


def _with_memory(readers: Readers, work: Callable[[], T]) -> tuple[T | None, QwenError | None]:
    """Attempt; if memory runs out, again without what is kept of earlier requests."""
    result, failure = attempt(work)
    if isinstance(failure, OutOfMemory) and readers.kept_bytes:
        logger.warning("Memory ran out; what earlier requests have read is let go")
        readers.shrink(0)
        result, failure = attempt(work)
    return result, failure


def _end_loop(scheduler: weakref.ref[Scheduler]) -> None:
    """At the interpreter's end: a thread that is in torch's code then aborts the process."""
    left = scheduler()
    if left is not None:
        left.end()
