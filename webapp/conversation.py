"""The conversation of one page: a small tree of messages, of which one path is shown.

Regenerate and Edit add a sibling, so nothing that was said is lost; stepping chooses between
siblings. Values are immutable; every change returns a new conversation. Knows neither Gradio nor
the model. What a browser stores and sends back is read by `parse_conversation`, which trusts
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from qwen.errors import InvalidConversation
from qwen.messages import FinishReason, Message, Role

FORMAT_VERSION = 1
MAX_NODES = 5_000
MAX_CHARACTERS = 4_000_000


@dataclass(frozen=True, slots=True)
class ReplyNote:
    """The figures under a reply; seconds and tokens per second."""

    tokens: int
    tokens_per_second: float
    time_to_first_token: float
    finish_reason: FinishReason
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Node:
    """A message and its place in the tree; `parent` is None for a first message."""

    id: int
    parent: int | None
    role: Role
    content: str
    note: ReplyNote | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A tree of messages; the path from the root to `leaf` is what the page shows."""

    nodes: tuple[Node, ...] = ()
    leaf: int | None = None

    def node(self, node_id: int) -> Node:
        """Return a node by its id, which is its position."""
        return self.nodes[node_id]

    @property
    def path(self) -> tuple[Node, ...]:
        """The shown nodes, first to last."""
        found: list[Node] = []
        at = self.leaf
        while at is not None:
            found.append(self.nodes[at])
            at = self.nodes[at].parent
        return tuple(reversed(found))

    @property
    def messages(self) -> tuple[Message, ...]:
        """The shown path as plain messages, first to last."""
        return tuple(Message(node.role, node.content) for node in self.path)

    def siblings(self, node_id: int) -> tuple[int, ...]:
        """Return the ids of all versions of a message, itself among them, oldest first."""
        parent = self.nodes[node_id].parent
        return tuple(node.id for node in self.nodes if node.parent == parent)

    @property
    def forks(self) -> tuple[int, ...]:
        """The shown nodes that have other versions, first to last."""
        return tuple(node.id for node in self.path if len(self.siblings(node.id)) > 1)

    def ask(self, content: str) -> Conversation:
        """Add a user's message behind the shown path.

        A last message that never got a reply is stepped aside for, not lost: the new one
        becomes its sibling.
        """
        last = self.nodes[self.leaf] if self.leaf is not None else None
        if last is not None and last.role == "user":
            return self._add(last.parent, "user", content, None)
        return self._add(self.leaf, "user", content, None)

    def edit(self, node_id: int, content: str) -> Conversation:
        """Add another version of a user's message and show it, without a reply yet."""
        if self.nodes[node_id].role != "user":
            raise InvalidConversation("Only your own messages can be edited.")
        return self._add(self.nodes[node_id].parent, "user", content, None)

    def answer(self, content: str, note: ReplyNote | None) -> Conversation:
        """Add a reply to the last shown user message; further ones become siblings."""
        asked = self.last_question
        if asked is None:
            raise InvalidConversation("There is no message to answer yet. Write one first.")
        return self._add(asked, "assistant", content, note)

    def extend(self, content: str, note: ReplyNote | None) -> Conversation:
        """Replace the shown last reply by a longer form of it."""
        assert self.leaf is not None
        node = replace(self.nodes[self.leaf], content=content, note=note)
        nodes = (*self.nodes[: node.id], node, *self.nodes[node.id + 1 :])
        return replace(self, nodes=nodes)

    def undo(self) -> tuple[Conversation, str]:
        """Step back before the last shown question; return its text too."""
        asked = self.last_question
        if asked is None:
            return self, ""
        node = self.nodes[asked]
        return replace(self, leaf=node.parent), node.content

    def step(self, node_id: int, offset: int) -> Conversation:
        """Show the version `offset` places after this one, with the newest path below it."""
        versions = self.siblings(node_id)
        place = min(max(versions.index(node_id) + offset, 0), len(versions) - 1)
        at = versions[place]
        while below := [node.id for node in self.nodes if node.parent == at]:
            at = below[-1]
        return replace(self, leaf=at)

    @property
    def last_question(self) -> int | None:
        """The id of the last user message on the shown path, if there is one."""
        return next((node.id for node in reversed(self.path) if node.role == "user"), None)

    def _add(
        self, parent: int | None, role: Role, content: str, note: ReplyNote | None
    ) -> Conversation:
        node = Node(len(self.nodes), parent, role, content, note)
        return Conversation((*self.nodes, node), node.id)


def to_json(conversation: Conversation, *, max_characters: int) -> dict[str, Any]:
    """Return a JSON-ready form for the browser's storage, bounded in size.

    Args:
        conversation: What to keep.
        max_characters: Bound on the sum of the message texts; beyond it the hidden versions
            are left out first, then the oldest turns.
    """
    if _characters(conversation.nodes) > max_characters:
        conversation = _shortened(conversation.path, max_characters)
    return {
        "version": FORMAT_VERSION,
        "leaf": conversation.leaf,
        "nodes": [
            {key: value for key, value in asdict(node).items() if key != "id"}
            for node in conversation.nodes
        ],
    }


def _characters(nodes: tuple[Node, ...]) -> int:
    return sum(len(node.content) for node in nodes)


def _shortened(path: tuple[Node, ...], max_characters: int) -> Conversation:
    """Keep the newest whole turns of a path that fit."""
    kept = path
    while kept and (_characters(kept) > max_characters or kept[0].role != "user"):
        kept = kept[1:]
    nodes = tuple(
        replace(node, id=place, parent=place - 1 if place else None)
        for place, node in enumerate(kept)
    )
    return Conversation(nodes, len(nodes) - 1 if nodes else None)


def parse_conversation(data: object) -> Conversation:
    """Read what a browser stored; it may have been forged, so everything is checked.

    Raises:
        InvalidConversation: Not the form that `to_json` writes, unknown roles, turns that do
            not alternate, texts that are not text, or more than the page would ever store.
    """
    if not isinstance(data, Mapping) or data.get("version") != FORMAT_VERSION:
        raise _refused("it is not in this version's format")
    listed = data.get("nodes")
    if not isinstance(listed, list) or len(listed) > MAX_NODES:
        raise _refused(f"it must be a list of at most {MAX_NODES:,} messages")
    nodes: list[Node] = []
    for entry in listed:
        nodes.append(_parse_node(entry, nodes))
    if _characters(tuple(nodes)) > MAX_CHARACTERS:
        raise _refused(f"it holds more than {MAX_CHARACTERS:,} characters")
    leaf = data.get("leaf")
    if leaf is not None and not _is_index(leaf, len(nodes)):
        raise _refused("its shown message does not exist")
    return Conversation(tuple(nodes), leaf)


def _refused(reason: str) -> InvalidConversation:
    return InvalidConversation(
        f"The stored conversation was refused: {reason}. A new conversation was begun."
    )


def _is_index(value: object, length: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < length


def _parse_node(entry: object, earlier: list[Node]) -> Node:
    if not isinstance(entry, Mapping):
        raise _refused("a message is not an object")
    role, content, parent = entry.get("role"), entry.get("content"), entry.get("parent")
    if role not in ("user", "assistant"):
        raise _refused("a message has a role other than user and assistant")
    if not isinstance(content, str):
        raise _refused("a message is not text")
    if parent is not None and not _is_index(parent, len(earlier)):
        raise _refused("a message has no place in the tree")
    above = earlier[parent].role if parent is not None else "assistant"
    if above == role:
        raise _refused("questions and replies do not alternate")
    return Node(len(earlier), parent, role, content, _parse_note(entry.get("note")))


def _parse_note(entry: object) -> ReplyNote | None:
    if entry is None:
        return None
    numbers = ("tokens", "tokens_per_second", "time_to_first_token", "dropped")
    if not isinstance(entry, Mapping) or entry.get("finish_reason") not in get_args(FinishReason):
        raise _refused("a reply's figures are malformed")
    values = {name: entry.get(name) for name in numbers}
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values.values()):
        raise _refused("a reply's figures are malformed")
    return ReplyNote(finish_reason=entry["finish_reason"], **values)  # type: ignore[arg-type]
