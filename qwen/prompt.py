"""From a conversation to token ids: encoding of segments, truncation to a token budget.

Only control segments may yield control ids (`<|im_start|>` and the like): what a user pastes stays
text. Knows no model library; a tokenizer and a chat format (`qwen.chat_format`) are handed in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from qwen.chat_format import ChatFormat, Segment, TextTokenizer
from qwen.errors import (
    EmptyMessage,
    InvalidConversation,
    MessageTooLong,
    PromptTooLong,
)
from qwen.messages import ContextUsage, Message, Role, Tool, ToolCall
from qwen.tool_prompt import pair_results

#: Text with more characters a token than this is refused or dropped before it is tokenized.
#: English and code have 3 to 5; only long runs of one character come near 16.
MAX_CHARACTERS_PER_TOKEN = 16

#: Tokens that a message without any history must leave for its reply.
MIN_REPLY_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids for a model, and how they fill its context."""

    ids: tuple[int, ...]
    usage: ContextUsage


class PromptBuilder:
    """Builds prompts that fit a context. Holds no state between calls, so threads may share it.

    The prompt gets `context_length` less a reserve for the reply, which is `max_new_tokens` but at
    most a quarter of the context, and never more than `max_input_tokens`. What does not fit
    loses its oldest turns; a turn is a user's message with the replies to it.

    Args:
        tokenizer: Encodes the texts.
        chat_format: None for a base model, which only completes raw text.
        context_length: Tokens of prompt and reply together.
        max_input_tokens: A smaller budget for the prompt.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        chat_format: ChatFormat | None,
        context_length: int,
        max_input_tokens: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._format = chat_format
        self._context_length = context_length
        self._limit = min(context_length, max_input_tokens or context_length)
        texts = sorted(tokenizer.control_ids, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def build_chat(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        tools: Sequence[Tool] = (),
        prefix: Sequence[Segment] = (),
        allow_empty: bool = False,
    ) -> Prompt:
        """Build the prompt of a conversation and drop the oldest turns that do not fit.

        Args:
            messages: An optional system message, then turns; the last one is the user's or a
                tool's.
            max_new_tokens: The longest reply that is wanted, in tokens.
            tools: What the model is told that it may call.
            prefix: The beginning of the reply that is to be continued.
            allow_empty: Accept an empty last message (to count tokens while a user types).

        Raises:
            EmptyMessage: The last message has no text.
            InvalidConversation: Unknown roles, or roles out of order.
            MessageTooLong: Refused by its size, without tokenizing it.
            PromptTooLong: System text and last message alone are over the budget.
        """
        assert self._format is not None, "a base model has no chat format"
        check_conversation(messages)
        if not allow_empty and messages[-1].role == "user" and not messages[-1].content.strip():
            raise EmptyMessage("The message is empty. Write something first.")
        chat_format = self._format

        def lay_out(kept: Sequence[Message]) -> _Layout:
            segments = (
                chat_format.render_chat(kept, tools) if tools else chat_format.render_chat(kept)
            )
            return _lay_out(
                [*segments, *prefix], len(kept), self._control_tokens, joins=chat_format.joins_text
            )

        limits = self._limits(max_new_tokens)
        if tools:
            limits = replace(limits, advice="Shorten the message or send fewer tools.")
        newest = split_turns(messages)[-1]
        size = sum(map(_size, newest)) + sum(len(segment.text) for segment in prefix)
        limits.check_size("The message" if len(newest) == 1 else "The newest turn", size)
        limits.check_size("The list of tools", sum(map(_tool_size, tools)))
        return _ChatFitter(self._tokenizer, lay_out, limits, messages).fit()

    def build_raw(self, text: str, *, max_new_tokens: int, allow_empty: bool = False) -> Prompt:
        """Build a prompt of plain text without any template.

        Raises:
            EmptyMessage: There is no text.
            MessageTooLong: Refused by its size, without tokenizing it.
            PromptTooLong: The text is over the budget.
        """
        if not allow_empty and not text.strip():
            raise EmptyMessage("The text to complete is empty. Write something first.")
        limits = self._limits(max_new_tokens)
        limits.check_size("The text", len(text))
        ids = self._tokenizer.encode_text(text)
        limits.check_tokens(0, len(ids))
        usage = ContextUsage(
            system=0,
            history=0,
            query=len(ids),
            limit=self._limit,
            context_length=self._context_length,
        )
        return Prompt(tuple(ids), usage)

    def _limits(self, max_new_tokens: int) -> _Limits:
        reserve = max(min(max_new_tokens, self._context_length // 4), 1)
        least_reply = min(reserve, MIN_REPLY_TOKENS)
        return _Limits(
            limit=self._limit,
            context_length=self._context_length,
            with_history=min(self._limit, self._context_length - reserve),
            alone=min(self._limit, self._context_length - least_reply),
        )

    def _control_tokens(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Split a control text into pairs of a text and the control id that follows it."""
        end = 0
        for match in self._control.finditer(text):
            yield text[end : match.start()], self._tokenizer.control_ids[match.group()]
            end = match.end()
        yield text[end:], None


@dataclass(frozen=True, slots=True)
class _Limits:
    """Budgets in tokens: as shown, for a prompt with history, and for one without.

    Attributes:
        advice: What to do about a prompt that is too long.
    """

    limit: int
    context_length: int
    with_history: int
    alone: int
    advice: str = "Shorten the message or the system prompt."

    def check_size(self, what: str, size: int) -> None:
        """Raise `MessageTooLong` for a size in characters that cannot fit."""
        if size > self.limit * MAX_CHARACTERS_PER_TOKEN:
            raise MessageTooLong(
                f"{what} has {size:,} characters, which cannot fit: the limit is "
                f"{self.limit:,} tokens, and a token is 3 to 5 characters of English or about one "
                "Chinese or Japanese character. Shorten it or send it in parts."
            )

    def check_tokens(self, system: int, query: int) -> None:
        """Raise `PromptTooLong` when there is no room even without any history."""
        if system + query <= self.alone:
            return
        parts = f"the message needs {query:,} tokens"
        if system:
            parts = f"the system prompt needs {system:,} tokens and the message {query:,}"
        raise PromptTooLong(
            f"The prompt is too long: {parts}, but at most {self.alone:,} fit, even with all "
            f"earlier turns left out. {self.advice}"
        )


@dataclass(frozen=True, slots=True)
class _Layout:
    """A rendered conversation, split at its control tokens but not yet encoded.

    Attributes:
        items: Ids of control tokens and the texts between them.
        starts: For each message the item at which its block begins: the last control token
            before its content.
    """

    items: list[int | str]
    starts: list[int]


def _lay_out(
    segments: Sequence[Segment],
    num_messages: int,
    control_tokens: Callable[[str], Iterable[tuple[str, int | None]]],
    *,
    joins: bool,
) -> _Layout:
    items: list[int | str] = []
    starts: dict[int, int] = {}
    block = 0

    def add_text(text: str) -> None:
        if joins and items and isinstance(items[-1], str):
            items[-1] += text
        elif text:
            items.append(text)

    for segment in segments:
        if segment.message is not None:
            starts.setdefault(segment.message, block)
        if not segment.is_control:
            add_text(segment.text)
            continue
        for text, control_id in control_tokens(segment.text):
            add_text(text)
            if control_id is not None:
                block = len(items)
                items.append(control_id)
    # A message that the format left out takes no room: its block is where the next one begins.
    next_start = len(items)
    for index in reversed(range(num_messages)):
        next_start = starts.setdefault(index, next_start)
    return _Layout(items, [starts[index] for index in range(num_messages)])


class _ChatFitter:
    """One request's search for the turns that fit.

    Every text is encoded once, and from the newest on only until the budget is spent, so that
    the cost is bounded by the budget and not by the history.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        lay_out: Callable[[Sequence[Message]], _Layout],
        limits: _Limits,
        messages: Sequence[Message],
    ) -> None:
        self._tokenizer = tokenizer
        self._lay_out_messages = lay_out
        self._limits = limits
        self._system = [message for message in messages[:1] if message.role == "system"]
        self._turns = split_turns(messages[len(self._system) :])
        self._layouts: dict[int, _Layout] = {}
        self._encoded: dict[str, list[int]] = {}

    def fit(self) -> Prompt:
        for message in self._system:
            self._limits.check_size("The system prompt", len(message.content))
        first = self._first_turn_by_size()
        first += self._turns_over_budget(first)
        while True:
            prompt = self._assemble(first)
            # One pass, unless a format's blocks depend on each other so that the sum was off.
            if len(prompt.ids) <= self._limits.with_history:
                return prompt
            if first == len(self._turns) - 1:
                self._limits.check_tokens(prompt.usage.system, prompt.usage.query)
                return prompt
            first += 1

    def _first_turn_by_size(self) -> int:
        """Return the first turn worth tokenizing, judged by characters alone."""
        room = self._limits.with_history * MAX_CHARACTERS_PER_TOKEN
        first = len(self._turns) - 1
        for turn in reversed(self._turns[:-1]):
            room -= sum(map(_size, turn))
            if room < 0:
                break
            first -= 1
        return first

    def _turns_over_budget(self, first: int) -> int:
        """Count the oldest of the turns from `first` on that do not fit."""
        layout = self._lay_out(first)
        starts = self._turn_starts(layout, first)
        system = self._count(layout.items[: starts[0]])
        query = self._count(layout.items[starts[-1] :])
        self._limits.check_tokens(system, query)
        left = self._limits.with_history - system - query
        for turn in reversed(range(len(starts) - 1)):
            items = layout.items[starts[turn] : starts[turn + 1]]
            characters = sum(len(item) for item in items if isinstance(item, str))
            if characters > left * MAX_CHARACTERS_PER_TOKEN:
                return turn + 1
            left -= self._count(items)
            if left < 0:
                return turn + 1
        return 0

    def _assemble(self, first: int) -> Prompt:
        layout = self._lay_out(first)
        starts = self._turn_starts(layout, first)
        ids = [token_id for item in layout.items for token_id in self._ids(item)]
        system = self._count(layout.items[: starts[0]])
        query = self._count(layout.items[starts[-1] :])
        usage = ContextUsage(
            system=system,
            history=len(ids) - system - query,
            query=query,
            limit=self._limits.limit,
            context_length=self._limits.context_length,
            dropped=tuple(message for turn in self._turns[:first] for message in turn),
        )
        return Prompt(tuple(ids), usage)

    def _lay_out(self, first: int) -> _Layout:
        if first not in self._layouts:
            kept = [message for turn in self._turns[first:] for message in turn]
            self._layouts[first] = self._lay_out_messages([*self._system, *kept])
        return self._layouts[first]

    def _turn_starts(self, layout: _Layout, first: int) -> list[int]:
        """Return the item at which each turn from `first` on begins."""
        starts = []
        index = len(self._system)
        for turn in self._turns[first:]:
            starts.append(layout.starts[index])
            index += len(turn)
        return starts

    def _count(self, items: Sequence[int | str]) -> int:
        return sum(len(self._ids(item)) for item in items)

    def _ids(self, item: int | str) -> list[int]:
        if isinstance(item, int):
            return [item]
        if item not in self._encoded:
            self._encoded[item] = self._tokenizer.encode_text(item)
        return self._encoded[item]


def _size(message: Message) -> int:
    """Count a message's characters, those of its calls included."""
    calls = sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    return len(message.content) + calls


def _tool_size(tool: Tool) -> int:
    return len(tool.name) + len(tool.description) + len(json.dumps(tool.parameters))


def split_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Group messages into turns: a user's message, the replies to it, calls and their results."""
    turns: list[list[Message]] = []
    for message in messages:
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def check_conversation(messages: Sequence[Message]) -> None:
    """Check types, roles and their order.

    Raises:
        InvalidConversation: There is no message, a role is unknown, a system message is not the
            first, a content is no text, a tool's message is the result of no call, or the last
            message is neither the user's nor a tool's.
    """
    if not messages:
        raise InvalidConversation("The conversation has no messages. Send at least one.")
    for index, message in enumerate(messages):
        if message.role not in get_args(Role):
            raise InvalidConversation(
                f"Message {index + 1} has an unknown role. Use system, user, assistant or tool."
            )
        if not isinstance(message.content, str):
            raise InvalidConversation(f"The content of message {index + 1} is not text.")
        if message.role == "system" and index > 0:
            raise InvalidConversation("Only the first message may be a system message.")
    _check_results(messages)
    if messages[-1].role not in ("user", "tool"):
        raise InvalidConversation("The last message must be the user's or a tool's.")


def _check_results(messages: Sequence[Message]) -> None:
    """Check that every run of tool messages belongs to the calls before it."""
    calls: Sequence[ToolCall] = ()
    results: list[Message] = []
    for message in messages:
        if message.role == "tool":
            results.append(message)
            pair_results(calls, results)
        else:
            calls, results = message.tool_calls, []
