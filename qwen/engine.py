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

from qwen.decoder import Decoder
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
from qwen.readers import DecoderReaders, Readers, SequenceReader, TransformersReaders
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

#: The same on a GPU: 2,048 take 0.05 s of a 7B model on an H200, chunks of 256 nearly three times.
PREFILL_CHUNK_GPU = 2048

#: Bytes of sequences kept for reuse: about 40,000 tokens of the embedded default, in bfloat16.
DEFAULT_PREFIX_BYTES = 512 * 2**20

#: Seconds between two looks at `cancel` while waiting for one's turn.
_QUEUE_POLL = 0.02

#: All that oneDNN says when it gets no memory for its scratchpad (run under RLIMIT_AS). It says the
#: same of an operation that it does not know, but then the warm-up would have failed.
_ONEDNN_OUT_OF_MEMORY = "could not create a primitive"


@dataclass(frozen=True, slots=True)
class EngineStep:
    """One step of a reply: either a token or, as the last step, the reason of the end.

    The token that ends a sequence (end of turn, end of text) is not part of the reply.

    Attributes:
        token_id: The token.
        logprob: Its natural log-probability by the model's own distribution, before temperature,
            penalty and cuts; None unless `SamplingParams.top_logprobs` asks for it.
        top_logprobs: The likeliest tokens and their log-probabilities, as many as asked for.
        finish_reason: Of the last step.
    """

    token_id: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


class Engine:
    """Runs requests on one model. `submit` and `close` may be called from any thread.

    Args:
        model: A causal language model of Transformers in eval mode; shared, never changed.
        eos_token_ids: Tokens that end a reply.
        context_length: Tokens of prompt and reply together.
        ntk_policy: See `NtkPolicy`.
        kv_cache: "int8" keeps keys and values in int8; "auto" does where the model's config asks.
        decoder: The model's fast forward; None reads with Transformers' own.
        prefix_bytes: Memory for what earlier requests have read, which a prompt that begins alike
            need not read again; 0 keeps nothing. Needs a decoder.

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
        decoder: Decoder | None = None,
        prefix_bytes: int = DEFAULT_PREFIX_BYTES,
    ) -> None:
        _check_ntk_policy(ntk_policy, model.config)
        self._readers: Readers | None = _build_readers(
            model, decoder, kv_cache=kv_cache, max_length=context_length, prefix_bytes=prefix_bytes
        )
        self._ntk_alpha = model.config.ntk_alpha if ntk_policy == "grow" else None
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
        readers, self._readers = self._readers, None
        if readers is not None:
            readers.clear()

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

        readers = self._readers
        reason: FinishReason = "cancelled"
        with self._turns.turn(give_up=cancelled) as has_turn:
            if has_turn and readers is not None:
                sequence = _named_errors(
                    lambda: _Sequence(readers, ids, params, ntk_alpha=self._ntk_alpha)
                )
                try:
                    reason = yield from self._tokens(sequence, params, cancelled)
                except OutOfMemory:
                    readers.clear()
                    raise
                finally:
                    # A caller may hold on to the error of a step, and so to this frame.
                    sequence.free()
                    if self._closed.is_set():
                        readers.clear()
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
    """One request's tokens, reader and sampler. Every method may run on another thread.

    `torch.inference_mode` belongs to a thread, so each method enters it anew: held across a
    `yield`, it would leak into whatever else the thread does.
    """

    def __init__(
        self,
        readers: Readers,
        ids: tuple[int, ...],
        params: SamplingParams,
        *,
        ntk_alpha: Callable[[int], int] | None,
    ) -> None:
        self.prompt_length = len(ids)
        self._readers: Readers | None = readers
        self._ntk_alpha = ntk_alpha
        self._ids = list(ids)
        with torch.inference_mode():
            self._sampler = Sampler(params, torch.tensor(ids, device=readers.device))
        self._reader: SequenceReader | None = None
        self._start()

    def _start(self) -> None:
        """Have the model read all tokens there are, from the beginning."""
        assert self._readers is not None
        self._logits: torch.Tensor | None = None
        self._alpha_length = len(self._ids)
        if self._reader is not None:  # freed before the next one grows
            self._reader.close()
        self._reader = None
        with torch.inference_mode():
            self._chunk = _prefill_chunk(self._readers.device)
            self._reader = self._readers.start(self._ids, chunk=self._chunk)
            unread = self._ids[self._reader.num_read :]
            self._unread = torch.tensor(unread, dtype=torch.int64, device=self._readers.device)

    @property
    def is_read(self) -> bool:
        """Whether the model has read all tokens, so that the next one can be chosen."""
        return len(self._unread) == 0

    def read_chunk(self) -> None:
        """Run the model on the next tokens that it has not read."""
        assert self._reader is not None
        with torch.inference_mode():
            chunk = self._unread[: self._chunk]
            self._logits = self._reader.read(chunk)
            self._unread = self._unread[len(chunk) :]

    def choose(self) -> int:
        """Choose the next token, which then is one to be read."""
        assert self._logits is not None and self.is_read
        with torch.inference_mode():
            token_id = self._sampler.choose(self._logits)
            self._unread = self._unread.new_tensor([token_id])
        self._ids.append(token_id)
        if self._ntk_alpha is not None and self._has_outgrown(self._ntk_alpha):
            self._start()
        return token_id

    def _has_outgrown(self, ntk_alpha: Callable[[int], int]) -> bool:
        """Tell whether a prompt as long as the sequence now is would get another alpha."""
        return ntk_alpha(len(self._ids)) != ntk_alpha(self._alpha_length)

    def free(self) -> None:
        """Let go of the model, and of the sequence's memory unless it is kept for reuse."""
        is_cuda = self._unread.is_cuda
        if self._reader is not None:
            self._reader.close()
        self._reader = self._logits = self._readers = None
        if is_cuda:
            torch.cuda.empty_cache()


def _prefill_chunk(device: torch.device) -> int:
    return PREFILL_CHUNK_GPU if device.type == "cuda" else PREFILL_CHUNK


def _build_readers(
    model: Any,
    decoder: Decoder | None,
    *,
    kv_cache: KvCacheChoice,
    max_length: int,
    prefix_bytes: int,
) -> Readers:
    from qwen.int8_cache import choose_kv_cache, wants_int8

    new_cache = choose_kv_cache(model.config, kv_cache=kv_cache)
    if decoder is None:
        return TransformersReaders(model, new_cache=new_cache)
    if kv_cache == "int8" or wants_int8(model.config):
        logger.warning("Decoding with Transformers' forward, which is slower: the cache is int8.")
        return TransformersReaders(model, new_cache=new_cache)
    return DecoderReaders(decoder, prefix_bytes=prefix_bytes, max_length=max_length)


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
