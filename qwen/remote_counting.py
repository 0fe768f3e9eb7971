"""How a request would fill a remote engine's context: near figures, and what drops out.

The engine's tokenizer is elsewhere. Where it has `/tokenize`, every text is counted there once; the
frame around the texts (ChatML's) and texts of other engines are estimated. So a figure is marked as
an estimate, and a margin is kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qwen.errors import MessageTooLong
from qwen.messages import ChatRequest, ContextUsage, Message
from qwen.tool_prompt import build_tool_value

#: ChatML around a message: <|im_start|>, the role, line breaks, <|im_end|>.
_FRAME_TOKENS = 5
#: The opening of the reply.
_OPENING_TOKENS = 3
#: Tokens that stay free where texts are counted by the engine, for a frame that is not ChatML.
_MARGIN = 48
#: Texts whose counts are remembered.
_REMEMBERED = 10_000
_MAX_CHARACTERS_PER_TOKEN = 16
_WIDE = re.compile("[\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")

#: Counts texts at the engine, in order; None for each that it did not count.
CountThere = Callable[[Sequence[str]], list[int | None]]


def estimate_tokens(text: str) -> int:
    """Return about how many tokens a Qwen tokenizer makes of a text.

    English and code have 3 to 5 characters a token, Chinese 1 to 2, other scripts 1 to 3.
    """
    if text.isascii():
        return -(-len(text) * 10 // 35)
    wide = len(_WIDE.findall(text))
    narrow = sum(character.isascii() for character in text)
    return -(-(wide * 7 + narrow * 3 + (len(text) - wide - narrow) * 6) // 10)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A request whose oldest turns may have been left out, and the longest reply, in tokens."""

    request: ChatRequest
    usage: ContextUsage
    max_tokens: int


class RemoteCounter:
    """Counts tokens for one engine. Threads may share it.

    Args:
        count_there: None where the engine does not count.
    """

    def __init__(self, count_there: CountThere | None) -> None:
        self._count_there = count_there
        self._known: OrderedDict[bytes, int] = OrderedDict()

    def count(self, texts: Sequence[str]) -> tuple[list[int], bool]:
        """Return the tokens of texts, and whether the engine has counted them all."""
        keys = [hashlib.blake2b(text.encode("utf-8", "replace")).digest() for text in texts]
        new = {
            key: text
            for key, text in zip(keys, texts, strict=True)
            if text and key not in self._known
        }
        if new and self._count_there is not None:
            counts = self._count_there(list(new.values()))
            for key, count in zip(new, counts, strict=True):
                if count is not None:
                    self._known[key] = count
        while len(self._known) > _REMEMBERED:
            try:
                self._known.popitem(last=False)
            except KeyError:  # another thread was faster
                break
        found = [self._known.get(key) if text else 0 for key, text in zip(keys, texts, strict=True)]
        is_counted = None not in found
        return [
            estimate_tokens(text) if count is None else count
            for count, text in zip(found, texts, strict=True)
        ], is_counted

    def fit(
        self, request: ChatRequest, context_length: int, max_input_tokens: int | None
    ) -> Fitted:
        """Leave out the oldest turns that do not fit, as the local backend does.

        Args:
            request: A conversation or a raw prompt.
            context_length: Of the engine; 0 when it is not known, and nothing is left out.
            max_input_tokens: A smaller budget for the prompt.

        Raises:
            MessageTooLong: A text is refused by its size alone.
        """
        reserve = min(request.params.max_new_tokens, context_length // 4)
        limit = min(context_length, max_input_tokens or context_length)
        _check_sizes(request, limit)
        system, turns, query = _parts(request)
        first = _first_by_size(turns, limit) if limit else 0
        kept = [_text(message) for turn in turns[first:] for message in turn]
        counts, is_counted = self.count([*system, *kept, *query])
        margin = _MARGIN if is_counted else _MARGIN + sum(counts) // 10
        costs = iter(counts)
        framed = 0 if request.raw_prompt is not None else _FRAME_TOKENS
        system_cost = sum(next(costs) + framed for _ in system)
        turn_costs = [sum(next(costs) + framed for _ in turn) for turn in turns[first:]]
        query_cost = sum(costs) + (framed + _OPENING_TOKENS if framed else 0)
        budget = min(limit, context_length - reserve) - margin - system_cost - query_cost
        while limit and turn_costs and sum(turn_costs) > budget:
            turn_costs.pop(0)
            first += 1
        usage = ContextUsage(
            system=system_cost,
            history=sum(turn_costs),
            query=query_cost,
            limit=limit,
            dropped=tuple(message for turn in turns[:first] for message in turn),
            context_length=context_length,
            is_estimate=True,
        )
        wanted = request.params.max_new_tokens
        # vLLM refuses a reply that would not fit beside the prompt.
        longest = max(min(wanted, usage.left - margin), 1) if limit else wanted
        return Fitted(_without(request, usage.dropped), usage, longest)


def _parts(request: ChatRequest) -> tuple[list[str], list[list[Message]], list[str]]:
    """Split a request into system text, earlier turns, and what is asked now."""
    if request.raw_prompt is not None:
        return [], [], [request.raw_prompt + request.reply_prefix]
    tools = [json.dumps(build_tool_value(tool), ensure_ascii=False) for tool in request.tools]
    messages = list(request.messages)
    system = [m.content for m in messages[:1] if m.role == "system"] + tools
    rest = messages[1:] if messages[:1] and messages[0].role == "system" else messages
    turns: list[list[Message]] = []
    for message in rest:
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    last = turns.pop() if turns else []
    query = "".join(map(_text, last)) + request.reply_prefix
    return system, turns, [query]


def _text(message: Message) -> str:
    """Return what a model reads of a message: its text and its calls, as Qwen2.5 writes them."""
    calls = (
        f'\n<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'
        for call in message.tool_calls
    )
    return message.content + "".join(calls)


def _check_sizes(request: ChatRequest, limit: int) -> None:
    if not limit:
        return
    newest = request.raw_prompt if request.raw_prompt is not None else ""
    texts = [newest, *(_text(m) for m in request.messages[-1:])]
    texts += [m.content for m in request.messages[:1] if m.role == "system"]
    longest = max(map(len, texts))
    if longest > limit * _MAX_CHARACTERS_PER_TOKEN:
        raise MessageTooLong(
            f"A text of {longest:,} characters cannot fit: the limit is {limit:,} tokens, and a "
            "token is 3 to 5 characters of English or about one Chinese or Japanese character. "
            "Shorten it or send it in parts."
        )


def _first_by_size(turns: Sequence[Sequence[Message]], limit: int) -> int:
    """Return the first turn worth counting, judged by characters alone."""
    room = limit * _MAX_CHARACTERS_PER_TOKEN
    first = len(turns)
    for turn in reversed(turns):
        room -= sum(len(_text(message)) for message in turn)
        if room < 0:
            break
        first -= 1
    return first


def _without(request: ChatRequest, dropped: tuple[Message, ...]) -> ChatRequest:
    if not dropped:
        return request
    start = 1 if request.messages[0].role == "system" else 0
    kept = (*request.messages[:start], *request.messages[start + len(dropped) :])
    return replace(request, messages=kept)
