"""`LocalBackend`: the `ChatBackend` on a model in this process. Prompt + engine + text stream.

Knows how these rooms fit together and what a checkpoint says about itself; knows no web framework
and does not touch tensors.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen.backend import BackendInfo, MemoryUse, ReportProgress, ignore_progress
from qwen.chat_format import ChatFormat, ReplyPlan, TextTokenizer
from qwen.checkpoint import parse_checkpoint
from qwen.devices import describe_devices
from qwen.engine import Engine, EngineStep
from qwen.errors import InvalidRequest, InvalidSetting
from qwen.fast_decoder import build_decoder, can_pack, kernels_folder
from qwen.load_options import DEFAULT_OPTIONS, LoadOptions
from qwen.messages import (
    ChatRequest,
    ContextUsage,
    FinishReason,
    SamplingParams,
    StreamEvent,
    Timing,
    TokenLogprobs,
    Usage,
    checked_number,
)
from qwen.model_shape import read_context_length
from qwen.own_thread import run_on_own_thread
from qwen.prompt import Prompt, PromptBuilder
from qwen.text_stream import stream_until_stop, stream_utf8
from qwen.token_log import LoggedToken, TokenLog
from qwen.tokenizer import build_chat_format, build_text_tokenizer
from qwen.tool_prompt import check_tools, offered_tools
from qwen.tool_stream import read_calls

if TYPE_CHECKING:
    from qwen.decoder import Decoder

#: Tokens that end a reply of a Qwen model, whatever its generation_config.json says: some released
#: ones name only one of the two.
_END_TOKENS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")

#: What Transformers takes for a sampling value that a checkpoint leaves out.
_TRANSFORMERS_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}


class LocalBackend:
    """Answers chat requests on a model in this process. Every method may run on any thread.

    Args:
        engine: Runs the model.
        tokenizer: Of the model's checkpoint.
        chat_format: None for a base model.
        info: What to say about the model; its `context_length` is the one that counts.
        max_input_tokens: A smaller budget for prompts; older turns beyond it are dropped.
        ntk_alpha: Tells for a prompt's length what `ContextUsage.ntk_alpha` is; None is always 1.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        *,
        chat_format: ChatFormat | None,
        info: BackendInfo,
        max_input_tokens: int | None = None,
        ntk_alpha: Callable[[int], int] | None = None,
    ) -> None:
        self._ntk_alpha = ntk_alpha
        self._engine = engine
        self._tokenizer = tokenizer
        self._info = info
        self._format = chat_format
        self._prompts = PromptBuilder(
            tokenizer,
            chat_format=chat_format,
            context_length=info.context_length,
            max_input_tokens=max_input_tokens,
        )

    @property
    def info(self) -> BackendInfo:
        """See `ChatBackend.info`."""
        return self._info

    def stream(self, request: ChatRequest, cancel: threading.Event) -> Iterator[StreamEvent]:
        """See `ChatBackend.stream`. Waiting for other requests counts towards the first token."""
        has_log = request.params.top_logprobs is not None
        return self._events(request, cancel, _Reply(asked=time.monotonic(), has_log=has_log))

    def count_tokens(self, request: ChatRequest) -> ContextUsage:
        """See `ChatBackend.count_tokens`. An empty last message is counted too."""
        return self._build_prompt(request, allow_empty=True).usage

    def close(self) -> None:
        """See `ChatBackend.close`."""
        self._engine.close()

    def warm_up(self) -> None:
        """Generate two tokens, so that the first user does not pay for what is set up lazily."""
        prompt = self._prompts.build_raw("Hello", max_new_tokens=2)
        params = SamplingParams(max_new_tokens=2)
        for _ in self._engine.submit(prompt.ids, params, cancel=threading.Event()):
            pass

    def _events(
        self, request: ChatRequest, cancel: threading.Event, reply: _Reply
    ) -> Iterator[StreamEvent]:
        prompt = self._build_prompt(request)
        plan = self._plan_reply(request)
        reader = plan.build_reader() if plan.build_reader is not None else None
        steps = self._engine.submit(prompt.ids, request.params, cancel=cancel)
        stops = (*request.params.stop, *plan.stop)
        try:
            yield StreamEvent(context=prompt.usage)
            for step in steps:
                if step.queued is None:
                    break
                yield StreamEvent(queued=step.queued)
            begun = itertools.chain([step], steps)
            decoded = reply.log.count(stream_utf8(self._bytes(begun, reply)))
            told = reply.events(stream_until_stop(decoded, stops))
            for event in read_calls(told, reader, heard=plan.heard):
                reply.has_calls = reply.has_calls or bool(event.tool_calls)
                yield event
        finally:
            # After a stop string, an error or a client that left, the engine is still at work.
            steps.close()
        yield StreamEvent(
            finish_reason=reply.end_reason(),
            usage=Usage(len(prompt.ids), reply.num_tokens),
            timing=reply.timing(),
        )

    def _bytes(self, steps: Iterable[EngineStep], reply: _Reply) -> Iterator[bytes]:
        """Yield the bytes of every token, and note tokens, times and the end in `reply`."""
        for step in steps:
            if step.token_id is None:
                reply.finish_reason = step.finish_reason or "stop"
                reply.is_over = True
                return
            reply.add(step.token_id)
            if reply.has_log:
                reply.log.add(step.token_id, self._logprobs(step))
            hidden = step.token_id in self._tokenizer.hidden_ids
            yield b"" if hidden else self._tokenizer.token_bytes(step.token_id)

    def _logprobs(self, step: EngineStep) -> TokenLogprobs:
        assert step.token_id is not None and step.logprob is not None
        token_bytes = self._tokenizer.token_bytes
        top = tuple((token_bytes(token_id), logprob) for token_id, logprob in step.top_logprobs)
        return TokenLogprobs(token_bytes(step.token_id), step.logprob, top)

    def _build_prompt(self, request: ChatRequest, *, allow_empty: bool = False) -> Prompt:
        prompt = self._fitted_prompt(request, allow_empty=allow_empty)
        if self._ntk_alpha is None:
            return prompt
        usage = replace(prompt.usage, ntk_alpha=self._ntk_alpha(len(prompt.ids)))
        return replace(prompt, usage=usage)

    def _fitted_prompt(self, request: ChatRequest, *, allow_empty: bool) -> Prompt:
        max_new_tokens = request.params.max_new_tokens
        if request.raw_prompt is not None:
            if request.messages:
                raise InvalidRequest("Send either messages or a raw prompt, not both.")
            if request.tools:
                raise InvalidRequest("A raw prompt has no tools. Send messages to use them.")
            return self._prompts.build_raw(
                request.raw_prompt + request.reply_prefix,
                max_new_tokens=max_new_tokens,
                allow_empty=allow_empty,
            )
        if not self._info.is_chat:
            raise InvalidRequest(
                f"{self._info.name} is a base model without a chat template. Send raw text to "
                "complete, or start the server with a chat model."
            )
        return self._prompts.build_chat(
            request.messages,
            max_new_tokens=max_new_tokens,
            tools=offered_tools(request),
            prefix=self._plan_reply(request).prefix,
            allow_empty=allow_empty,
        )

    def _plan_reply(self, request: ChatRequest) -> ReplyPlan:
        if request.raw_prompt is not None or self._format is None:
            return ReplyPlan()
        check_tools(request)
        return self._format.plan_reply(request)


@dataclass
class _Reply:
    """What is known of a running reply; times are seconds of the monotonic clock.

    The finish reason stands until the engine gives another: an engine that is not asked for more
    was stopped by a stop string.

    Attributes:
        has_log: Tokens come with their log-probabilities, and so with the text that shows them.
        is_over: The engine came to its end.
    """

    asked: float
    has_log: bool = False
    is_over: bool = False
    finish_reason: FinishReason = "stop"
    num_tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    log: TokenLog = field(default_factory=TokenLog)
    has_calls: bool = False
    _new_ids: list[int] = field(default_factory=list)

    def add(self, token_id: int) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.num_tokens += 1
        self._new_ids.append(token_id)

    def events(self, texts: Iterable[str]) -> Iterator[StreamEvent]:
        """Yield the events that show these texts."""
        for text in texts:
            if self.has_log:
                yield _logged_event(text, self.log.show(text))
            else:
                yield StreamEvent(text=text, token_ids=self.take_new_ids())
        if self.has_log and self.is_over and (rest := self.log.rest()):
            yield _logged_event("", rest)

    def take_new_ids(self) -> tuple[int, ...]:
        """Return the tokens added since the last call."""
        ids, self._new_ids = tuple(self._new_ids), []
        return ids

    def end_reason(self) -> FinishReason:
        """Return why the reply ended; "tool_calls" where it ended by itself and made calls."""
        made_calls = self.has_calls and self.finish_reason == "stop"
        return "tool_calls" if made_calls else self.finish_reason

    def timing(self) -> Timing:
        """Return the times; without a token, the time until the end counts as that to the first."""
        seconds = self.last - self.first
        return Timing(
            time_to_first_token=(self.first or time.monotonic()) - self.asked,
            tokens_per_second=(self.num_tokens - 1) / seconds if seconds > 0 else 0.0,
        )


def _logged_event(text: str, tokens: tuple[LoggedToken, ...]) -> StreamEvent:
    return StreamEvent(
        text=text,
        token_ids=tuple(token.token_id for token in tokens),
        logprobs=tuple(token.logprobs for token in tokens),
    )


def load_backend(
    checkpoint: str,
    options: LoadOptions = DEFAULT_OPTIONS,
    *,
    report: ReportProgress = ignore_progress,
) -> LocalBackend:
    """Load a checkpoint and build the backend on it.

    Args:
        checkpoint: "auto", a folder, a file or a hub name; see `qwen.checkpoint`.
        options: How to load and run it.
        report: Called with what is being done.

    Raises:
        CheckpointError: The weights cannot be had or read.
        DoesNotFit: As `qwen.preflight.check_start`.
        OutOfMemory: They do not fit.
        InvalidSetting: As `Engine`.
    """
    return run_on_own_thread(partial(_load, checkpoint, options, report))


def _load(checkpoint: str, options: LoadOptions, report: ReportProgress) -> LocalBackend:
    from qwen.loading import load_model, runs_on_gpu
    from qwen.preflight import Wish, check_start

    parse_checkpoint(checkpoint)  # a misspelt name fails before seconds of imports
    folder = kernels_folder()
    packs = options.dtype == "auto" and not runs_on_gpu(options.device) and can_pack(folder)
    # Weights that will be packed are read in the smallest form that loses nothing they have.
    dtype = "bfloat16" if packs else options.dtype
    wish = Wish(
        device=options.device,
        dtype=dtype,
        kv_cache=options.kv_cache,
        num_gpus=options.num_gpus,
        can_offload=options.offload_folder is not None,
        packs=packs,
    )
    checked = check_start(checkpoint, wish, enforce=not options.skip_preflight, report=report)
    loaded = load_model(
        checkpoint,
        device=options.device,
        dtype=dtype,
        num_gpus=options.num_gpus,
        offload_folder=options.offload_folder,
        report=report,
    )
    backend = build_backend(
        loaded.model,
        loaded.tokenizer,
        options,
        name=loaded.name,
        notices=(*loaded.notices, *checked.notices),
        context_limit=checked.context_limit,
        memory=checked.memory,
        kernels_folder=folder if packs else None,
    )
    report("Warming up")
    backend.warm_up()
    return backend


def build_backend(
    model: Any,
    tokenizer: Any,
    options: LoadOptions = DEFAULT_OPTIONS,
    *,
    name: str,
    notices: tuple[str, ...] = (),
    context_limit: int | None = None,
    memory: MemoryUse | None = None,
    kernels_folder: Path | None = None,
) -> LocalBackend:
    """Build the backend on a model and a tokenizer of Transformers.

    Args:
        model: In evaluation mode.
        tokenizer: Of its checkpoint.
        options: How to run it; what is about loading is not looked at.
        name: See `BackendInfo`; likewise `notices` and `memory`.
        notices: Sentences for the user.
        context_limit: Offer so many tokens of context at most.
        memory: What the model takes.
        kernels_folder: See `qwen.fast_decoder.build_decoder`.

    Raises:
        CheckpointUnsupported: The tokenizer is of a kind that cannot be made safe.
        InvalidSetting: As `Engine`.
    """
    texts = build_text_tokenizer(tokenizer)
    chat_format = build_chat_format(
        tokenizer, chat_format=getattr(model.generation_config, "chat_format", None)
    )
    context_length = read_context_length(model.config)
    if context_limit is not None:
        context_length = min(context_length, context_limit)
    decoder, dtype = _build_decoder(model, kernels_folder)
    info = BackendInfo(
        name=name,
        context_length=context_length,
        is_chat=chat_format is not None,
        device=describe_devices(model),
        dtype=dtype,
        default_params=read_default_params(model.generation_config, context_length),
        notices=notices,
        memory=memory,
    )
    engine = Engine(
        model,
        eos_token_ids=read_end_tokens(model.generation_config, tokenizer, texts),
        context_length=context_length,
        kv_cache=options.kv_cache,
        ntk_policy=options.ntk_policy,
        decoder=decoder,
        limits=options.limits,
        is_strict=options.strict_reproducible,
    )
    return LocalBackend(
        engine,
        texts,
        chat_format=chat_format,
        info=info,
        max_input_tokens=options.max_input_tokens,
        ntk_alpha=model.config.ntk_alpha if model.config.model_type == "qwen" else None,
    )


def _build_decoder(model: Any, kernels_folder: Path | None) -> tuple[Decoder | None, str]:
    """Build the decoder if the model can have one; also tell the form of the weights."""
    from qwen.gptq_loading import describe_weights
    from qwen.loading import cpu_has_bfloat16

    decoder = build_decoder(model, kernels_folder=kernels_folder)
    if decoder is None and kernels_folder is not None and not cpu_has_bfloat16():
        model.float()  # it was read to be packed, and runs as it is: bfloat16 would be emulated
    is_packed = decoder is not None and decoder.is_exact
    return decoder, "6-bit" if is_packed else describe_weights(model)


def read_end_tokens(generation_config: Any, tokenizer: Any, texts: TextTokenizer) -> frozenset[int]:
    """Collect the ids that end a reply: of the generation config, the tokenizer and ChatML."""
    named = generation_config.eos_token_id
    ids = {*(named if isinstance(named, list | tuple) else [named]), tokenizer.eos_token_id}
    ids |= {texts.control_ids.get(text) for text in _END_TOKENS}
    return frozenset(int(token_id) for token_id in ids if token_id is not None)


def read_default_params(generation_config: Any, context_length: int) -> SamplingParams:
    """Return a checkpoint's own sampling settings, or ours where it has none.

    Values outside our ranges are left out. A checkpoint that states some has Transformers'
    defaults for the others, and one that says it does not sample gets temperature 0.
    """
    stated = {k: v for k, v in generation_config.to_diff_dict().items() if v is not None}
    values: dict[str, Any] = {"max_new_tokens": max(min(1024, context_length // 4), 1)}
    if stated.get("do_sample") is False:
        values |= _TRANSFORMERS_DEFAULTS | {"temperature": 0.0, "top_k": 0}
    elif not stated.keys().isdisjoint(_TRANSFORMERS_DEFAULTS):
        values |= _TRANSFORMERS_DEFAULTS
        for key in _TRANSFORMERS_DEFAULTS.keys() & stated.keys():
            try:
                values[key] = checked_number(key, stated[key])
            except InvalidSetting:
                continue
    return SamplingParams(**values)
