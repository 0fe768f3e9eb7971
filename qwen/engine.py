"""Token ids in, token ids out: the one decode loop on the one shared model.

Knows no text, no messages and no tokenizer; nobody outside sees a tensor. One request runs at a
time and the others wait in the order they came; a scheduler that batches them can replace the body
of `Engine` and leave its callers alone.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch

from qwen.devices import input_device
from qwen.errors import (
    BackendFailed,
    BackendNotReady,
    InvalidRequest,
    InvalidSetting,
    OutOfMemory,
    PromptTooLong,
    QwenError,
    is_out_of_memory,
)
from qwen.messages import FinishReason, SamplingParams
from qwen.sampling import Sampler

if TYPE_CHECKING:
    from qwen.int8_cache import KvCacheChoice

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Which alpha a Qwen v1 model with dynamic NTK has once a reply outgrows its prompt's: "published"
#: keeps the prompt's, "grow" reads the sequence again with the alpha of its present length.
NtkPolicy = Literal["published", "grow"]

#: Prompt tokens read between two looks at `cancel`. Measured on 2 CPU cores with the embedded
#: default: 256 take 0.4 s, at 0.94 of the speed of 1,024 at once; 128 reach 0.8 of it, 64 0.6.
PREFILL_CHUNK = 256

#: Seconds between two looks at `cancel` while waiting for one's turn.
_QUEUE_POLL = 0.02

#: All that oneDNN says when it gets no memory for its scratchpad (run under RLIMIT_AS). It says the
#: same of an operation that it does not know, but then the warm-up would have failed.
_ONEDNN_OUT_OF_MEMORY = "could not create a primitive"


@dataclass(frozen=True, slots=True)
class EngineStep:
    """One step of a reply: either a token or, as the last step, the reason of the end.

    The token that ends a sequence (end of turn, end of text) is not part of the reply.
    """

    token_id: int | None = None
    finish_reason: FinishReason | None = None


class Engine:
    """Runs requests on one model. `submit` and `close` may be called from any thread.

    Args:
        model: A causal language model of Transformers in eval mode; shared, never changed.
        eos_token_ids: Tokens that end a reply.
        context_length: Tokens of prompt and reply together.
        ntk_policy: See `NtkPolicy`.
        kv_cache: "int8" keeps keys and values in int8; "auto" does where the model's config asks.

    Raises:
        InvalidSetting: "grow" for a model without dynamic NTK, or "int8" for one with layers that
            cannot be cached so.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Iterable[int],
        context_length: int,
        ntk_policy: NtkPolicy = "published",
        kv_cache: KvCacheChoice = "auto",
    ) -> None:
        from qwen.int8_cache import choose_kv_cache

        _check_ntk_policy(ntk_policy, model.config)
        self._new_cache = choose_kv_cache(model.config, kv_cache=kv_cache)
        self._model = model
        self._ntk_policy = ntk_policy
        self._eos = frozenset(eos_token_ids)
        self._context_length = context_length
        self._vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self._turns = FairLock()
        self._closed = threading.Event()

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a reply."""
        return self._eos

    def submit(
        self, ids: Sequence[int], params: SamplingParams, *, cancel: threading.Event
    ) -> Iterator[EngineStep]:
        """Generate a reply to a prompt, step by step.

        The request takes its place in the queue with the first `next()`. Closing the iterator,
        from any thread while no `next()` runs, or dropping it frees its memory and its turn.

        Args:
            ids: The prompt.
            params: `stop` is not looked at: it is about text.
            cancel: Read between any two tokens and chunks of the prompt; the last step then has
                finish reason "cancelled".

        Yields:
            The tokens, then one step with the finish reason.

        Raises:
            BackendNotReady: The engine was closed.
            InvalidRequest: No ids, or ids that the model does not know.
            PromptTooLong: The prompt leaves no room for a token.
            OutOfMemory: At a step; what came before stays valid and the next request works.
            BackendFailed: At a step; the log has the traceback.
        """
        self._check(ids)
        return self._run(tuple(ids), params, cancel)

    def close(self) -> None:
        """Refuse new requests, cancel running and waiting ones, let go of the model.

        Does not wait: a running request ends within one token and frees the memory then.
        """
        self._closed.set()
        self._model = None

    def _check(self, ids: Sequence[int]) -> None:
        if self._closed.is_set():
            raise BackendNotReady("The server is shutting down. Start it again to go on.")
        if not ids:
            raise InvalidRequest("The prompt is empty. Send some text.")
        unknown = [token_id for token_id in ids if not 0 <= token_id < self._vocab_size]
        if unknown:
            raise InvalidRequest(
                f"The prompt has token ids that the model does not know ({unknown[0]} of "
                f"{self._vocab_size:,}). The tokenizer does not belong to this model."
            )
        if len(ids) >= self._context_length:
            raise PromptTooLong(
                f"The prompt has {len(ids):,} tokens, but the model's context holds "
                f"{self._context_length:,} for prompt and reply together. Shorten it."
            )

    def _run(
        self, ids: tuple[int, ...], params: SamplingParams, cancel: threading.Event
    ) -> Iterator[EngineStep]:
        def cancelled() -> bool:
            return cancel.is_set() or self._closed.is_set()

        model = self._model
        reason: FinishReason = "cancelled"
        with self._turns.turn(give_up=cancelled) as has_turn:
            if has_turn and model is not None:
                sequence = _named_errors(
                    lambda: _Sequence(
                        model,
                        ids,
                        params,
                        new_cache=self._new_cache,
                        ntk_policy=self._ntk_policy,
                    )
                )
                try:
                    reason = yield from self._tokens(sequence, params, cancelled)
                finally:
                    # A caller may hold on to the error of a step, and so to this frame.
                    sequence.free()
        yield EngineStep(finish_reason=reason)

    def _tokens(
        self, sequence: _Sequence, params: SamplingParams, cancelled: Callable[[], bool]
    ) -> Generator[EngineStep, None, FinishReason]:
        room = self._context_length - sequence.prompt_length
        for _ in range(min(params.max_new_tokens, room)):
            while not sequence.is_read and not cancelled():
                _named_errors(sequence.read_chunk)
            if cancelled():
                return "cancelled"
            token_id = _named_errors(sequence.choose)
            if token_id in self._eos:
                return "stop"
            yield EngineStep(token_id=token_id)
        return "length"


class _Sequence:
    """One request's tokens, cache and sampler. Every method may run on another thread.

    `torch.inference_mode` belongs to a thread, so each method enters it anew: held across a
    `yield`, it would leak into whatever else the thread does.
    """

    def __init__(
        self,
        model: Any,
        ids: tuple[int, ...],
        params: SamplingParams,
        *,
        new_cache: Callable[[], Any],
        ntk_policy: NtkPolicy,
    ) -> None:
        self.prompt_length = len(ids)
        self._model = model
        self._new_cache = new_cache
        self._grows = ntk_policy == "grow"
        self._ids = list(ids)
        with torch.inference_mode():
            self._sampler = Sampler(params, torch.tensor(ids, device=input_device(model)))
        self._start()

    def _start(self) -> None:
        """Have the model read all tokens there are, from an empty cache."""
        model = self._model
        self._logits: torch.Tensor | None = None
        self._cache: Any = None  # freed before the next one grows
        self._cache = self._new_cache()
        # Qwen v1 scales its rotary base by the whole prompt's length, and here it comes in chunks.
        is_v1 = model.config.model_type == "qwen"
        self._options = {"prompt_length": len(self._ids)} if is_v1 else {}
        with torch.inference_mode():
            self._unread = torch.tensor(self._ids, dtype=torch.int64, device=input_device(model))

    @property
    def is_read(self) -> bool:
        """Whether the model has read all tokens, so that the next one can be chosen."""
        return len(self._unread) == 0

    def read_chunk(self) -> None:
        """Run the model on the next tokens that it has not read."""
        with torch.inference_mode():
            chunk = self._unread[:PREFILL_CHUNK]
            output = self._model(
                chunk[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
                **self._options,
            )
            self._logits = output.logits[0, -1]
            self._unread = self._unread[len(chunk) :]

    def choose(self) -> int:
        """Choose the next token, which then is one to be read."""
        assert self._logits is not None and self.is_read
        with torch.inference_mode():
            token_id = self._sampler.choose(self._logits)
            self._unread = self._unread.new_tensor([token_id])
        self._ids.append(token_id)
        if self._grows and self._has_outgrown_alpha():
            self._start()
        return token_id

    def _has_outgrown_alpha(self) -> bool:
        """Tell whether a prompt as long as the sequence now is would get another alpha."""
        alpha = self._model.config.ntk_alpha
        return bool(alpha(len(self._ids)) != alpha(self._options["prompt_length"]))

    def free(self) -> None:
        """Let go of the cache and the model."""
        is_cuda = self._unread.is_cuda
        self._cache = self._logits = self._model = None
        if is_cuda:
            torch.cuda.empty_cache()


def _check_ntk_policy(ntk_policy: NtkPolicy, config: Any) -> None:
    if ntk_policy not in get_args(NtkPolicy):
        raise InvalidSetting(f"ntk_policy must be published or grow, not {ntk_policy!r}.")
    if ntk_policy == "grow" and not getattr(config, "use_dynamic_ntk", False):
        raise InvalidSetting(
            "The NTK policy grow is for Qwen v1 models with dynamic NTK (use_dynamic_ntk), and "
            "this model is none. Leave out ntk_policy (--ntk-policy), or choose such a checkpoint."
        )


def _named_errors(work: Callable[[], T]) -> T:
    """Do some work and turn torch's exceptions into ours."""
    try:
        return work()
    except QwenError:
        raise
    except Exception as error:
        failure = _named_error(error)
    # Out here, or the new error would hold the old one as its context, and with it the tensors
    # in the frames of its traceback.
    raise failure


def _named_error(error: Exception) -> QwenError:
    if is_out_of_memory(error) or _ONEDNN_OUT_OF_MEMORY in str(error):
        logger.warning("Out of memory while generating (%s)", str(error))
        return OutOfMemory(
            "Memory ran out while generating. Shorten the conversation or start a new chat, "
            "lower max_new_tokens, or use a smaller model."
        )
    logger.error("Generating failed", exc_info=error)
    return BackendFailed(
        "Generating failed because of an unexpected fault. The server's log has the details; "
        "try again."
    )


class FairLock:
    """A lock that is granted in the order of asking and that may be freed by another thread."""

    def __init__(self) -> None:
        # Reentrant: the garbage collector may close an iterator, and so end its turn, at any
        # allocation, also at one in here.
        self._mutex = threading.RLock()
        self._queue: deque[threading.Event] = deque()

    @contextlib.contextmanager
    def turn(self, *, give_up: Callable[[], bool]) -> Iterator[bool]:
        """Wait for one's turn and hold it within the `with` block.

        Args:
            give_up: Called every few milliseconds while waiting; True leaves the queue.

        Yields:
            Whether it is our turn; False after giving up.
        """
        ticket = threading.Event()
        with self._mutex:
            self._queue.append(ticket)
            if self._queue[0] is ticket:
                ticket.set()
        try:
            while not ticket.wait(0 if give_up() else _QUEUE_POLL):
                if give_up():
                    break
            yield ticket.is_set()
        finally:
            with self._mutex:
                self._queue.remove(ticket)
                if self._queue:
                    self._queue[0].set()
