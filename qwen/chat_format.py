"""How a model was taught to see a conversation: segments of text and control, ChatML.

A prompt is a list of segments; `qwen.prompt` turns them into ids. Knows no model library. Source of
ChatML: Qwen's tokenization note; the ids of Qwen v1's `make_context`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qwen.errors import InvalidRequest
from qwen.messages import ChatRequest, Message, Role, Tool
from qwen.tool_stream import CallReader


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt.

    Attributes:
        is_control: Only in control segments the texts of control tokens become their ids.
        message: Index of the message whose content this is; None for what a format adds.
    """

    text: str
    is_control: bool
    message: int | None = None


@dataclass(frozen=True, slots=True)
class ReplyPlan:
    """How a reply is begun, ended and read.

    Attributes:
        prefix: What the reply is made to begin with.
        stop: Texts that end it, beside those of the request.
        build_reader: Makes a reader of calls; None where there can be none.
        heard: What of `prefix` the reader has to know of.
    """

    prefix: tuple[Segment, ...] = ()
    stop: tuple[str, ...] = ()
    build_reader: Callable[[], CallReader] | None = None
    heard: str = ""


def plan_plain_reply(request: ChatRequest) -> ReplyPlan:
    """Plan a reply without tools: it begins as the request says."""
    return ReplyPlan(prefix=(Segment(request.reply_prefix, is_control=False),))


class TextTokenizer(Protocol):
    """What prompts and replies need of a tokenizer. All methods may be called from any thread."""

    @property
    def control_ids(self) -> Mapping[str, int]:
        """Text and id of every token that plain text must never yield."""
        ...

    @property
    def hidden_ids(self) -> frozenset[int]:
        """Ids that are not shown when a model puts them into a reply."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Encode plain text; never yields one of `control_ids` and adds nothing."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; `b""` for an id without one."""
        ...


class ChatFormat(Protocol):
    """How a model was taught to see a conversation."""

    @property
    def joins_text(self) -> bool:
        """Whether texts of neighbouring segments are encoded as one.

        True as in Transformers' chat templates; False as in Qwen v1, where a message never
        merges with the line break before it.
        """
        ...

    def render_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Segment]:
        """Render a conversation up to and with the opening of the assistant's reply.

        Raises:
            InvalidConversation: The format cannot express this sequence of roles.
        """
        ...

    def plan_reply(self, request: ChatRequest) -> ReplyPlan:
        """Tell how the reply to a request is begun, ended and read."""
        ...


class ChatMLFormat:
    """ChatML as the Qwen models know it; `qwen.react` brings tools to it.

    Args:
        default_system: System text of conversations that have none; None leaves the block out.
        joins_text: See `ChatFormat.joins_text`.
    """

    def __init__(self, *, default_system: str | None = None, joins_text: bool = True) -> None:
        self._default_system = default_system
        self._joins_text = joins_text

    @property
    def joins_text(self) -> bool:
        """See `ChatFormat.joins_text`."""
        return self._joins_text

    def render_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Segment]:
        """See `ChatFormat.render_chat`. Knows no tools."""
        if tools:
            raise InvalidRequest("This chat format knows no tools. Send the request without.")
        segments = []
        if self._default_system is not None and (not messages or messages[0].role != "system"):
            segments += _chatml_block("system", Segment(self._default_system, is_control=True))
        for index, message in enumerate(messages):
            content = Segment(message.content, is_control=False, message=index)
            segments += _chatml_block(message.role, content)
        return [*segments, *_chatml_opening("assistant")]

    def plan_reply(self, request: ChatRequest) -> ReplyPlan:
        """See `ChatFormat.plan_reply`."""
        return plan_plain_reply(request)


def _chatml_block(role: Role, content: Segment) -> list[Segment]:
    end = [Segment("<|im_end|>", is_control=True), Segment("\n", is_control=True)]
    return [*_chatml_opening(role), content, *end]


def _chatml_opening(role: Role) -> list[Segment]:
    # Two segments, since Qwen v1 encodes the role and the line break each on its own.
    return [Segment(f"<|im_start|>{role}", is_control=True), Segment("\n", is_control=True)]
