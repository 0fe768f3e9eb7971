"""A checkpoint's own Jinja chat template, made safe for text that users and tools write.

Knows the chat templates of Transformers; knows no model and encodes nothing.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen.chat_format import ReplyPlan, Segment, plan_plain_reply
from qwen.errors import InvalidConversation
from qwen.messages import ChatRequest, Message, Tool
from qwen.tool_prompt import (
    build_call_value,
    build_tool_value,
    must_call,
    offered_tools,
    wanted_name,
)
from qwen.tool_stream import CLOSE_TAG, OPEN_TAG, TaggedCallReader


class TemplateFormat:
    """A `ChatFormat` that renders a checkpoint's own Jinja chat template.

    The template sees unguessable placeholders for the contents. What it writes around them is
    control text, and contents come in afterwards as plain text, so nothing in them can pass for
    a part of the template. A second rendering finds what the template does to contents
    (trimming, or leaving out old reasoning), which is applied to the plain texts.

    Tools and calls are values that a template takes apart and writes as JSON, so they go in as
    they are, but for what could be, or begin, a control token: that is masked and comes back as
    plain text.

    Args:
        tokenizer: A Transformers tokenizer with a chat template; only read.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self._special_texts = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self._control_texts = sorted((t.content for t in added), key=len, reverse=True)
        self.knows_tools = _knows_tools(tokenizer)

    @property
    def joins_text(self) -> bool:
        """See `ChatFormat.joins_text`."""
        return True

    def render_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Segment]:
        """See `ChatFormat.render_chat`.

        A system message that the template does not know goes in front of the first user message.
        """
        chat = _TemplateChat(self._tokenizer, messages, tools, _Mask(_starts(self._control_texts)))
        rendered = self._render_safely(chat)
        if rendered is None and messages[0].role == "system" and len(messages) > 1:
            rendered = self._render_safely(replace(chat, merges_system=True))
        if rendered is None:
            raise InvalidConversation(
                "The model's chat template does not accept this conversation. Let user and "
                "assistant take turns, beginning with the user."
            )
        return rendered

    def plan_reply(self, request: ChatRequest) -> ReplyPlan:
        """See `ChatFormat.plan_reply`."""
        tools = offered_tools(request)
        if not tools:
            return plan_plain_reply(request)
        plan = ReplyPlan(
            prefix=plan_plain_reply(request).prefix,
            build_reader=lambda: TaggedCallReader([tool.name for tool in tools]),
        )
        if not must_call(request):
            return plan
        name = wanted_name(request)
        # The model goes on with a space and the value, or with the name: tokens that it knows.
        begun = '\n{"name": "' if name is None else f'\n{{"name": {json.dumps(name)}, "arguments":'
        line_break = [Segment("\n", is_control=True)] if request.reply_prefix else []
        return replace(
            plan,
            prefix=(
                *plan.prefix,
                *line_break,
                Segment(OPEN_TAG, is_control=True),
                Segment(begun, is_control=False),
            ),
            heard=OPEN_TAG + begun,
            # One tool was named, and one call of it is wanted.
            stop=() if request.tool_choice == "required" else (CLOSE_TAG,),
        )

    def _render_safely(self, chat: _TemplateChat) -> list[Segment] | None:
        """Render to segments; None when the template refuses or leaves out a message."""
        secret = secrets.token_hex(12)
        messages = chat.messages
        # A call without a text has none for the template either.
        named = {i for i, m in enumerate(messages) if m.content or not m.tool_calls}
        names = [f"X{secret}N{i}X" if i in named else "" for i in range(len(messages))]
        text = chat.render(names)
        if text is None:
            return None
        pieces = re.split(f"X{secret}N([0-9]+)X", text)
        controls, order = pieces[::2], [int(index) for index in pieces[1::2]]
        if set(order) != named:
            return None
        slots = self._transformed(chat, controls, order)
        slots = slots or [messages[index].content for index in order]
        segments = chat.mask.segments(controls[0])
        for index, content, control in zip(order, slots, controls[1:], strict=True):
            segments.append(Segment(content, is_control=False, message=index))
            segments += chat.mask.segments(control)
        return segments

    def _transformed(
        self, chat: _TemplateChat, controls: Sequence[str], order: Sequence[int]
    ) -> list[str] | None:
        """Return each content as the template renders it, or None when that cannot be told.

        Special tokens within contents are masked, so that a control text that has one is found
        where the template put it and nowhere else.
        """
        mask = _Mask([text for text in self._special_texts if any(text in c for c in controls)])
        contents = [mask.hide(message.content) for message in chat.messages]
        text = chat.render(contents)
        if text is None or not text.startswith(controls[0]) or not text.endswith(controls[-1]):
            return None
        slots = []
        place = len(controls[0])
        for index, control in zip(order[:-1], controls[1:-1], strict=True):
            end = place + len(contents[index])
            if not (text.startswith(contents[index], place) and text.startswith(control, end)):
                end = text.find(control, place) if control else -1
            if end < 0:
                return None
            slots.append(mask.reveal(text[place:end]))
            place = end + len(control)
        last = len(text) - len(controls[-1])
        return [*slots, mask.reveal(text[place:last])] if last >= place else None


def _knows_tools(tokenizer: Any) -> bool:
    """Tell whether a chat template renders tools in the form that `TaggedCallReader` reads."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return False
    return bool(re.search(r"\btools\b", template)) and OPEN_TAG in template


def _starts(controls: Sequence[str]) -> list[str]:
    """Return what no control text can do without: its first character, or all if it is a letter.

    Masking single characters leaves no beginning that what stands beside could complete.
    """
    return sorted({text if text[0].isalnum() else text[0] for text in controls if text})


@dataclass(frozen=True)
class _TemplateChat:
    """A conversation as a template is given it, but for the contents.

    Attributes:
        mask: Hides what could be control text in tools and calls.
        merges_system: Put the system message in front of the first user message.
    """

    tokenizer: Any
    messages: Sequence[Message]
    tools: Sequence[Tool]
    mask: _Mask
    merges_system: bool = False

    def render(self, contents: Sequence[str]) -> str | None:
        """Render the template with these contents; None when it refuses the roles."""
        from jinja2 import TemplateError

        chat = [
            self._value(message, content)
            for message, content in zip(self.messages, contents, strict=True)
        ]
        if self.merges_system:
            chat[1]["content"] = f"{chat[0]['content']}\n\n{chat[1]['content']}"
            del chat[0]
        tools = [self.mask.hide_all(build_tool_value(tool)) for tool in self.tools]
        try:
            text: str = self.tokenizer.apply_chat_template(
                chat, tools=tools or None, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError):  # TypeError: a filter that takes no such value
            return None
        return text

    def _value(self, message: Message, content: str) -> dict[str, Any]:
        value: dict[str, Any] = {"role": message.role, "content": content}
        if message.tool_calls:
            calls = [build_call_value(call) for call in message.tool_calls]
            value["tool_calls"] = self.mask.hide_all(calls)
        if message.role == "tool":
            value["tool_call_id"] = self.mask.hide(message.tool_call_id)
        return value


class _Mask:
    """Replaces texts by unguessable names and back."""

    def __init__(self, texts: Sequence[str]) -> None:
        secret = secrets.token_hex(12)
        self._names = {text: f"Y{secret}N{index}Y" for index, text in enumerate(texts)}
        self._texts = {name: text for text, name in self._names.items()}
        self._text = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        self._name = re.compile(f"(Y{secret}N[0-9]+Y)")

    def hide(self, content: str) -> str:
        return self._text.sub(lambda found: self._names[found.group()], content)

    def hide_all(self, value: Any) -> Any:
        """Hide in every text of a JSON value, keys included."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {self.hide_all(key): self.hide_all(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide_all(inner) for inner in value]
        return value

    def reveal(self, content: str) -> str:
        return self._name.sub(lambda found: self._texts[found.group()], content)

    def segments(self, control: str) -> list[Segment]:
        """Split a control text at what is hidden in it, which becomes plain text."""
        pieces = self._name.split(control)
        return [
            Segment(self._texts[piece], is_control=False)
            if index % 2
            else Segment(piece, is_control=True)
            for index, piece in enumerate(pieces)
            if piece or len(pieces) == 1
        ]
