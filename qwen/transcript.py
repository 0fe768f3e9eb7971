"""A conversation as a JSON file: what the page exports, and what the terminal saves and loads.

Pure text; what is read is checked, since files are edited by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen.errors import InvalidConversation
from qwen.messages import Message

FORMAT, VERSION = "qwen-chat-transcript", 1
#: Characters of a file that is read; as many as the page takes back from a browser.
MAX_CHARACTERS = 4_000_000


@dataclass(frozen=True, slots=True)
class Transcript:
    """What is exported.

    Attributes:
        title: Heading of the file.
        model: The model's name; empty when there is none.
        created: Time of the export, ISO 8601.
        system_prompt: Empty when there is none.
        entries: The messages in order, each with the note shown under it, which may be empty.
    """

    title: str
    model: str
    created: str
    system_prompt: str
    entries: tuple[tuple[Message, str], ...]


def export_json(transcript: Transcript) -> str:
    """Return the conversation as JSON, with the raw texts.

    The object has `format` ("qwen-chat-transcript"), `version` (1), `title`, `model`, `created`
    (ISO 8601), `system_prompt` and `messages`: a list of `role` ("user" or "assistant"),
    `content` and, where there is one, `note`.
    """
    messages = [
        {"role": message.role, "content": message.content, **({"note": note} if note else {})}
        for message, note in transcript.entries
    ]
    document = {
        "format": FORMAT,
        "version": VERSION,
        "title": transcript.title,
        "model": transcript.model,
        "created": transcript.created,
        "system_prompt": transcript.system_prompt,
        "messages": messages,
    }
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def parse_transcript(text: str) -> Transcript:
    """Read what `export_json` wrote.

    Raises:
        InvalidConversation: It is something else; the message says what is wrong.
    """
    if len(text) > MAX_CHARACTERS:
        raise _refused(f"it has more than {MAX_CHARACTERS:,} characters")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise _refused("it is no JSON") from None
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise _refused(f'its "format" is not "{FORMAT}"')
    if document.get("version") != VERSION:
        raise _refused(f'its "version" is not {VERSION}')
    messages = document.get("messages")
    if not isinstance(messages, list):
        raise _refused('its "messages" are no list')
    head = {name: document.get(name, "") for name in ("title", "model", "created", "system_prompt")}
    if not all(isinstance(value, str) for value in head.values()):
        raise _refused("a text at its head is none")
    entries = tuple(_parse_entry(entry, number) for number, entry in enumerate(messages))
    return Transcript(**head, entries=entries)


def _parse_entry(entry: Any, number: int) -> tuple[Message, str]:
    if not isinstance(entry, Mapping):
        raise _refused(f"message {number + 1} is no object")
    role, content, note = entry.get("role"), entry.get("content"), entry.get("note", "")
    wanted = ("user", "assistant")[number % 2]
    if role != wanted:
        raise _refused(f"message {number + 1} is not of the {wanted}: questions and replies differ")
    if not isinstance(content, str) or not isinstance(note, str):
        raise _refused(f"message {number + 1} has no text")
    try:
        (content + note).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which no tokenizer and no file takes
        raise _refused(f"message {number + 1} has broken characters") from None
    return Message(wanted, content), note  # type: ignore[arg-type]


def _refused(reason: str) -> InvalidConversation:
    return InvalidConversation(
        f"This is not a conversation that was saved here: {reason}. Choose a JSON file that the "
        "page exported or that :save wrote."
    )
