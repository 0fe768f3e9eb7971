"""Openings that let a dense model write about many things, in several forms and languages.

Made from the lists in `tuning_prompts.json`, written for this project: half are questions in the
model's own chat format, half plain beginnings of a text. Knows no model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen.calibration import encode_segment
from qwen.chat_format import ChatFormat, Segment, TextTokenizer
from qwen.errors import CheckpointDamaged, InvalidConversation
from qwen.messages import Message

_LISTS = Path(__file__).with_name("tuning_prompts.json")
#: English, Chinese and code alike often; other languages are what English is asked for in.
_KINDS = ("en", "zh", "code")
_OTHER_LANGUAGE = 0.15


def build_prompts(
    tokenizer: TextTokenizer, chat_format: ChatFormat | None, *, count: int, seed: int = 0
) -> list[Sequence[int]]:
    """Return token ids that begin a text or a conversation.

    Args:
        tokenizer: The checkpoint's.
        chat_format: The checkpoint's; without one, or where it refuses, all are plain text.
        count: How many.
        seed: The same one gives the same prompts.

    Raises:
        CheckpointDamaged: The lists are not installed.
    """
    chance = random.Random(seed)
    lists = _read_lists()
    prompts: list[Sequence[int]] = []
    for number in range(count):
        question, beginning = _write(lists, _KINDS[number % len(_KINDS)], chance)
        ids = _asked(tokenizer, chat_format, question) if chance.random() < 0.5 else []
        prompts.append(ids or tokenizer.encode_text(beginning))
    return prompts


def _read_lists() -> dict[str, Any]:
    try:
        lists: dict[str, Any] = json.loads(_LISTS.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointDamaged(
            f"The lists {_LISTS} are not installed. Install this project again, or name a text of "
            "your own with --calibration."
        ) from None
    return lists


def _write(lists: dict[str, Any], kind: str, chance: random.Random) -> tuple[str, str]:
    """Return a request and, on the same topic, the beginning of a text."""
    form, topic = (chance.choice(lists[kind][key]) for key in ("forms", "topics"))
    if kind == "zh":
        return f"请以“{topic}”为题,写{form}。", chance.choice((f"{topic}\n\n", f"{topic}", "\n"))
    if kind == "code":
        language = chance.choice(lists[kind]["languages"])
        beginning = chance.choice((f"# {topic}\n", f"/* {topic} */\n", f"// {topic}, {language}\n"))
        return f"Write {form} in {language}: {topic}.", beginning
    request = f"Write {form} about {topic}"
    if chance.random() < _OTHER_LANGUAGE:
        return f"{request}, in {chance.choice(lists['languages'])}.", f"{form}: {topic}\n\n"
    title = topic[0].upper() + topic[1:]
    return f"{request}.", chance.choice((f"{title}\n\n", title, f"{title}. ", "The "))


def _asked(tokenizer: TextTokenizer, chat_format: ChatFormat | None, question: str) -> list[int]:
    if chat_format is None:
        return []
    try:
        segments: list[Segment] = chat_format.render_chat([Message("user", question)])
    except InvalidConversation:
        return []
    return [token for segment in segments for token in encode_segment(tokenizer, segment)]
