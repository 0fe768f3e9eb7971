"""The published chat surface of Qwen v1: `chat` and `chat_stream` on a model of Transformers.

Functions over a model and a tokenizer, for scripts and notebooks; `QWenLMHeadModel` has them as
methods. Knows prompt building and text streams; the web page and the API do not come here, they
use `qwen.local`. What differs from the published code is listed in docs/tokenization.md.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qwen.chat_format import ChatMLFormat, TextTokenizer
from qwen.devices import input_device
from qwen.errors import (
    CheckpointUnsupported,
    EmptyMessage,
    InvalidConversation,
    InvalidRequest,
    InvalidSetting,
)
from qwen.messages import Message
from qwen.prompt import PromptBuilder
from qwen.text_stream import stream_utf8
from qwen.tokenizer import QWEN_SYSTEM, build_text_tokenizer

#: Published default of `make_context`, in tokens.
MAX_WINDOW_SIZE = 6144

_ENDOFTEXT = "<|endoftext|>"
#: Tokens that end a reply and are no part of it.
_END_TOKENS = {"chatml": ("<|im_end|>", "<|im_start|>", _ENDOFTEXT), "raw": (_ENDOFTEXT,)}
#: Longer than any prompt, so that `PromptBuilder` only counts.
_NO_LIMIT = 2**40

History = Sequence[Sequence[str]]


def chat(
    model: Any,
    tokenizer: Any,
    query: str,
    history: History | None = None,
    system: str = QWEN_SYSTEM,
    stop_words_ids: Sequence[Sequence[int]] | None = None,
    generation_config: GenerationConfig | None = None,
    **kwargs: Any,
) -> tuple[str, list[Any]]:
    """Answer a query.

    Args:
        model: A causal language model of Transformers.
        tokenizer: Its tokenizer.
        query: The user's message, or with chat_format "raw" the text to continue.
        history: Earlier turns, each a pair (query, response); not changed.
        system: The system text; the empty one is told to the model too.
        stop_words_ids: Token sequences after which the reply ends. They stay in the response.
        generation_config: In place of the model's.
        **kwargs: Of `generate`, and `chat_format` and `max_window_size` (tokens of system text
            and history), which else come from the generation config.

    Returns:
        The response, and the history with this turn added; `history` itself is not changed.

    Raises:
        InvalidRequest: Query, history or a setting has the wrong form.
    """
    call = _Call(model, tokenizer, generation_config, kwargs)
    context = call.build_context(query, history, system, stop_words_ids)
    output = call.generate(context)
    response = decode_tokens(
        output, tokenizer, context_length=len(context), chat_format=call.chat_format
    )
    return response, _extended(history, query, response)


def chat_stream(
    model: Any,
    tokenizer: Any,
    query: str,
    history: History | None = None,
    system: str = QWEN_SYSTEM,
    stop_words_ids: Sequence[Sequence[int]] | None = None,
    generation_config: GenerationConfig | None = None,
    **kwargs: Any,
) -> Iterator[str]:
    """Answer a query while it is being generated. Arguments and errors as in `chat`.

    The model runs on a thread of its own. Closing the generator ends it after the token at work.

    Yields:
        The response so far, each time it has grown, and at least once; the last one is what
        `chat` returns. A character that is still incomplete is held back, white space at the end
        too.
    """
    call = _Call(model, tokenizer, generation_config, kwargs)
    context = call.build_context(query, history, system, stop_words_ids)
    return _stream_response(call, context)


def _stream_response(call: _Call, context: Sequence[int]) -> Iterator[str]:
    ids = _stream_ids(lambda streamer: call.generate(context, streamer), call.cancelled)
    ends = _end_ids(call.texts, call.chat_format)
    new_ids = takewhile(lambda token_id: token_id not in ends, ids)
    text, shown = "", None
    try:
        for piece in stream_utf8(call.texts.token_bytes(token_id) for token_id in new_ids):
            text += piece
            if text.strip() and text.strip() != shown:
                shown = text.strip()
                yield shown
    finally:
        ids.close()
    if shown is None:
        yield ""


def _stream_ids(
    generate: Callable[[BaseStreamer], object], cancelled: threading.Event
) -> Generator[int, None, None]:
    """Run a generation on a thread and yield the ids that it hands to its streamer.

    Raises:
        Exception: Whatever the generation raised.
    """
    items: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            generate(_IdStreamer(items.put))
        except BaseException as error:
            items.put(error)
        else:
            items.put(None)

    thread = threading.Thread(target=run, name="qwen-chat-stream", daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        cancelled.set()
        thread.join()  # at most one token long, or the prompt if none has come yet


class _IdStreamer(BaseStreamer):
    """Passes on the ids of new tokens, not those of the prompt, which come first."""

    def __init__(self, put: Callable[[int], None]) -> None:
        self._put = put
        self._had_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._had_prompt:
            for token_id in value.flatten().tolist():
                self._put(token_id)
        self._had_prompt = True

    def end(self) -> None:
        """Do nothing: the end is known when `generate` returns."""


class _StopAfterSequences(StoppingCriteria):
    """Stops a row that ends with one of some token sequences, or all rows on an event."""

    def __init__(
        self, stops: Iterable[Sequence[int]], *, prompt_length: int, cancelled: threading.Event
    ) -> None:
        self._stops = [torch.tensor(stop) for stop in stops]
        self._prompt_length = prompt_length
        self._cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Tell which rows are done; a sequence that began in the prompt does not count."""
        new = input_ids[:, self._prompt_length :]
        done = torch.full(new.shape[:1], self._cancelled.is_set(), device=new.device)
        for stop in self._stops:
            if new.shape[1] >= len(stop):
                done |= (new[:, -len(stop) :] == stop.to(new.device)).all(dim=1)
        return done


class _Call:
    """The settings of one request. Reads the generation config and changes none."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> None:
        self.texts = build_text_tokenizer(tokenizer)
        self.cancelled = threading.Event()
        self._model = model
        self._tokenizer = tokenizer
        own = model.generation_config
        given = own if generation_config is None else generation_config

        def published(name: str, default: Any) -> Any:
            values = [kwargs.pop(name, None), getattr(given, name, None), getattr(own, name, None)]
            return next((value for value in values if value is not None), default)

        self.chat_format: str = published("chat_format", "chatml")
        self._max_window_size: int = published("max_window_size", MAX_WINDOW_SIZE)
        self._criteria = list(kwargs.pop("stopping_criteria", None) or ())
        self._config = copy.deepcopy(given)
        self._rest = self._config.update(**kwargs)
        self._config.return_dict_in_generate = False
        if self._config.pad_token_id is None:
            self._config.pad_token_id = self.texts.control_ids.get(_ENDOFTEXT)

    def build_context(
        self,
        query: str,
        history: History | None,
        system: str,
        stop_words_ids: Sequence[Sequence[int]] | None,
    ) -> list[int]:
        """Build the prompt, and set when its reply ends."""
        _, context = make_context(
            self._tokenizer, query, history, system, self._max_window_size, self.chat_format
        )
        if not context:
            raise EmptyMessage("The text to complete is empty. Write something first.")
        own = get_stop_words_ids(self.chat_format, self._tokenizer)
        ends = [[token_id] for token_id in _end_ids(self.texts, self.chat_format)]
        stops = [*_checked_stops(stop_words_ids or ()), *own, *ends]
        stop = _StopAfterSequences(stops, prompt_length=len(context), cancelled=self.cancelled)
        self._criteria.append(stop)
        return context

    def generate(self, context: Sequence[int], streamer: BaseStreamer | None = None) -> list[int]:
        """Run the model; return prompt and reply."""
        input_ids = torch.tensor([context], device=input_device(self._model))
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=self._config,
            stopping_criteria=StoppingCriteriaList(self._criteria),
            **({"streamer": streamer} if streamer is not None else {}),
            **self._rest,
        )
        ids: list[int] = output[0].tolist()
        return ids


def _checked_stops(stop_words_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    stops = [list(stop) if isinstance(stop, list | tuple) else [] for stop in stop_words_ids]
    if not all(stop and all(isinstance(i, int) for i in stop) for stop in stops):
        raise InvalidSetting(
            "stop_words_ids must be a list of lists of token ids, such as "
            '[tokenizer.encode("Observation:")], and none may be empty.'
        )
    return stops


def _extended(history: History | None, query: str, response: str) -> list[Any]:
    return [*copy.deepcopy(list(history or ())), (query, response)]


def make_context(
    tokenizer: Any,
    query: str,
    history: History | None = None,
    system: str = "",
    max_window_size: int = MAX_WINDOW_SIZE,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """Build the prompt of a query, exactly as the published code does.

    Contents never yield control ids. The newest turns are kept as long as they and the system
    text stay below `max_window_size`; the query does not count.

    Args:
        tokenizer: Of the model.
        query: The user's message.
        history: Earlier turns, each a pair (query, response).
        system: The system text. Its block is there even when it is empty.
        max_window_size: In tokens.
        chat_format: "chatml", or "raw": the query alone, whose special tokens count as such.

    Returns:
        The text of the prompt and its ids.

    Raises:
        InvalidConversation: The history is no list of pairs of texts, or a text is none.
        InvalidRequest: The chat format is unknown.
    """
    _check_format(chat_format)
    if chat_format == "raw":
        return query, tokenizer.encode(query, add_special_tokens=False)
    texts = build_text_tokenizer(tokenizer)
    ends = [Message("system", system), Message("user", query)]
    usage = _build(texts, ends, limit=_NO_LIMIT).usage
    # PromptBuilder counts the query and the line break after the system block, published code
    # counts neither and wants the sum to be below the window: the two differences of one cancel.
    budget = max(max_window_size, usage.system) + usage.query
    messages = [ends[0], *_history_messages(history or ()), ends[1]]
    prompt = _build(texts, messages, limit=budget)
    kept = [ends[0], *messages[1 + len(prompt.usage.dropped) :]]
    text = "".join(segment.text for segment in _FORMAT.render_chat(kept))
    return text, list(prompt.ids)


_FORMAT = ChatMLFormat(joins_text=False)


def _build(texts: TextTokenizer, messages: Sequence[Message], *, limit: int) -> Any:
    builder = PromptBuilder(
        texts, chat_format=_FORMAT, context_length=limit + 1, max_input_tokens=limit
    )
    return builder.build_chat(messages, max_new_tokens=1, allow_empty=True)


def _history_messages(history: History) -> Iterator[Message]:
    for number, turn in enumerate(history, start=1):
        if isinstance(turn, str) or len(turn) != 2 or not all(isinstance(t, str) for t in turn):
            raise InvalidConversation(
                f"Turn {number} of the history is not a pair of texts (query, response)."
            )
        yield Message("user", turn[0])
        yield Message("assistant", turn[1])


def decode_tokens(
    tokens: Sequence[int] | torch.Tensor,
    tokenizer: Any,
    raw_text_len: int | None = None,
    context_length: int = 0,
    chat_format: str = "chatml",
    verbose: bool = False,
    return_end_reason: bool = False,
    errors: str = "replace",
) -> Any:
    """Return the response in a model's output.

    Args:
        tokens: Ids of prompt and reply.
        tokenizer: Of the model.
        raw_text_len: Not needed any more: the prompt is cut off by its tokens.
        context_length: Tokens of the prompt.
        chat_format: "chatml" or "raw".
        verbose: Only False: what a user wrote is never printed.
        return_end_reason: Also return why the reply ended, in the published words.
        errors: What to do with bytes that are no UTF-8: as in `bytes.decode`.

    Raises:
        InvalidRequest: The chat format is unknown, or `verbose` is asked for.
    """
    _check_format(chat_format)
    if verbose:
        raise InvalidSetting("verbose=True is not supported. Print what is returned instead.")
    texts = build_text_tokenizer(tokenizer)
    ids = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
    ends = _end_ids(texts, chat_format)
    reply = list(takewhile(lambda token_id: token_id not in ends, ids[context_length:]))
    data = b"".join(texts.token_bytes(token_id) for token_id in reply)
    response = data.decode("utf-8", errors).strip()
    if not return_end_reason:
        return response
    end = context_length + len(reply)
    if chat_format == "raw" or end >= len(ids):
        return response, f"Gen length {len(ids)}"
    return response, f"Gen {texts.token_bytes(ids[end]).decode()!r}"


def get_stop_words_ids(chat_format: str, tokenizer: Any) -> list[list[int]]:
    """Return the token sequences after which a reply of a chat format ends.

    Raises:
        InvalidRequest: The chat format is unknown.
    """
    _check_format(chat_format)
    texts = build_text_tokenizer(tokenizer)
    if chat_format == "raw":
        return [texts.encode_text("Human:"), [_control_id(texts, _ENDOFTEXT)]]
    return [[_control_id(texts, "<|im_end|>")], [_control_id(texts, "<|im_start|>")]]


def _end_ids(texts: TextTokenizer, chat_format: str) -> frozenset[int]:
    return frozenset(_control_id(texts, text) for text in _END_TOKENS[chat_format])


def _control_id(texts: TextTokenizer, text: str) -> int:
    if text not in texts.control_ids:
        raise CheckpointUnsupported(
            f"The tokenizer has no {text}, so it is not that of a Qwen chat model. Choose a "
            "checkpoint of Qwen."
        )
    return texts.control_ids[text]


def _check_format(chat_format: str) -> None:
    if chat_format not in _END_TOKENS:
        raise InvalidRequest(
            f"The chat format {chat_format!r} is unknown. Use 'chatml' for chat models or 'raw' "
            "for base models."
        )
