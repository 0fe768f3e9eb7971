"""Token ids in, token ids out: the one shared model, for many users at once.

Knows no text, no messages and no tokenizer; nobody outside sees a tensor. Checks what is asked for;
`qwen.scheduler` runs it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from qwen.decoder import Decoder
from qwen.errors import InvalidRequest, InvalidSetting, OutOfMemory, PromptTooLong
from qwen.messages import SamplingParams
from qwen.readers import DecoderReaders, Readers, TransformersReaders
from qwen.reply_steps import EngineStep, ReplySteps, Request
from qwen.scheduler import Scheduler, Terms
from qwen.serving_limits import DEFAULT_LIMITS, ServingLimits

if TYPE_CHECKING:
    from qwen.int8_cache import KvCacheChoice

__all__ = ["DEFAULT_PREFIX_BYTES", "Engine", "EngineStep", "NtkPolicy"]

logger = logging.getLogger(__name__)

#: Which alpha a Qwen v1 model with dynamic NTK has once a reply outgrows its prompt's: "published"
#: keeps the prompt's, "grow" reads the sequence again with the alpha of its present length.
NtkPolicy = Literal["published", "grow"]

#: Bytes of sequences kept for reuse: about 40,000 tokens of the embedded default, in bfloat16.
DEFAULT_PREFIX_BYTES = 512 * 2**20

#: The part of a GPU's free memory that they may have if that is more: they are 1,000 tokens of
#: Qwen-7B, less than one conversation.
_PREFIX_PART_OF_GPU = 8

#: Replies that are written at the same time.
_MAX_RUNNING = {"cpu": 8, "cuda": 32}


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
            need not read again; 0 keeps nothing, None is `DEFAULT_PREFIX_BYTES` or, if that is
            more, an eighth of a GPU's free memory. Needs a decoder.
        limits: How much is served at once.
        is_strict: Give the same reply alone or beside others also where rounding forbids to read
            several sequences at once; see docs/serving.md.

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
        prefix_bytes: int | None = None,
        limits: ServingLimits = DEFAULT_LIMITS,
        is_strict: bool = False,
    ) -> None:
        _check_ntk_policy(ntk_policy, model.config)
        if prefix_bytes is None:
            prefix_bytes = _default_prefix_bytes(decoder)
        readers = _build_readers(
            model, decoder, kv_cache=kv_cache, max_length=context_length, prefix_bytes=prefix_bytes
        )
        self._eos = frozenset(eos_token_ids)
        self._context_length = context_length
        self._vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self._position_bytes = readers.position_bytes
        self._cache_bytes = _cache_bytes(readers, limits, context_length, prefix_bytes)
        device = readers.device.type
        max_running = limits.max_running or _MAX_RUNNING.get(device, _MAX_RUNNING["cpu"])
        if is_strict and device == "cuda":
            max_running = 1  # a GPU's kernels round by how many sequences there are
            if decoder is not None:
                decoder.settle()
        terms = Terms(
            max_running=max_running,
            max_waiting=limits.max_waiting,
            cache_bytes=self._cache_bytes,
            eos=self._eos,
            ntk_alpha=model.config.ntk_alpha if ntk_policy == "grow" else None,
            is_strict=is_strict,
        )
        self._scheduler = Scheduler(readers, terms)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a reply."""
        return self._eos

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run and that wait."""
        return self._scheduler.load

    def submit(
        self, ids: Sequence[int], params: SamplingParams, *, cancel: threading.Event
    ) -> ReplySteps:
        """Generate a reply to a prompt, step by step.

        The request takes its place in the queue at once and runs whether or not steps are taken.
        Closing the iterator, from any thread, or dropping it frees its memory and its turn within
        one step of the loop.

        Args:
            ids: The prompt.
            params: `stop` is not looked at: it is about text.
            cancel: Read between any two tokens and chunks of the prompt; the last step then has
                finish reason "cancelled".

        Returns:
            Places in the queue while the request waits, the tokens, then one step with the finish
            reason.

        Raises:
            BackendNotReady: The engine was closed.
            InvalidRequest: No ids, or ids that the model does not know.
            PromptTooLong: The prompt leaves no room for a token.
            TooManyRequests: The queue is full.
            OutOfMemory: The cache could never hold the request, or, at a step, memory ran out; what
                came before stays valid and other requests go on.
            BackendFailed: At a step; the log has the traceback.
        """
        self._check(ids)
        max_tokens = min(params.max_new_tokens, self._context_length - len(ids))
        nbytes = self._position_bytes * (len(ids) + max_tokens)
        self._check_bytes(nbytes)
        request = Request(tuple(ids), params, cancel, max_tokens=max_tokens, nbytes=nbytes)
        self._scheduler.submit(request)
        return ReplySteps(request, self._scheduler.watch)

    def close(self) -> None:
        """Refuse new requests, cancel running and waiting ones, let go of the model.

        Does not wait: a running request ends within one token and frees the memory then.
        """
        self._scheduler.close()

    def _check_bytes(self, nbytes: int) -> None:
        if self._cache_bytes and nbytes > self._cache_bytes:
            raise OutOfMemory(
                f"Prompt and reply may take {nbytes / 1e6:,.0f} MB of cache, but this server has "
                f"{self._cache_bytes / 1e6:,.0f} MB. Shorten the conversation or lower "
                "max_new_tokens."
            )

    def _check(self, ids: Sequence[int]) -> None:
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


def _default_prefix_bytes(decoder: Decoder | None) -> int:
    if decoder is None or decoder.device.type != "cuda":
        return DEFAULT_PREFIX_BYTES
    free, _ = torch.cuda.mem_get_info(decoder.device)
    return max(DEFAULT_PREFIX_BYTES, free // _PREFIX_PART_OF_GPU)


def _cache_bytes(
    readers: Readers, limits: ServingLimits, context_length: int, prefix_bytes: int
) -> int:
    """Return the bound of keys and values; 0 where their size is not known."""
    if limits.cache_bytes is not None or not readers.position_bytes:
        return limits.cache_bytes or 0
    least = readers.position_bytes * context_length + prefix_bytes
    if readers.device.type == "cuda":
        return max(least, torch.cuda.mem_get_info(readers.device)[0] // 2)
    return least
