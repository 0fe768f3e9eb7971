"""The terminal chat over a scripted backend, as a program: what the user asks decides the reply."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

from fake_backend import FakeBackend

from qwen.backend import BackendInfo
from qwen.cli import run
from qwen.errors import BackendFailed
from qwen.messages import ChatRequest, Message, SamplingParams

MARKDOWN = "# Heading\n\nSome **bold** `Vector<int>` text.\nSecond line.\n\n```python\nx = 1\n```"
REPLIES = {
    "hi": "hello there",
    "markdown": MARKDOWN,
    "escape": "before \x1b]0;owned\x07\x1b[2J\x9b31m after",
    "slow": " ".join(f"word{number}" for number in range(1000)),
    "lines": "\n".join(f"line {number}" for number in range(100)),
}


class ScriptedBackend(FakeBackend):
    """Says what `REPLIES` has for the question, else what it was told."""

    def _events(self, request: ChatRequest, cancel: object) -> Iterator[object]:
        question = request.messages[-1].content
        self.pause = 0.02 if question == "slow" else 0.0
        fails = question == "fail"
        self.fault = BackendFailed("It broke. Try again.") if fails else None
        for event in super()._events(request, cancel):
            yield event
            if question == "stuck" and event.text:  # at work, and looking at nothing
                time.sleep(60)


def reply(request: ChatRequest) -> str:
    question = request.messages[-1].content
    told = f"heard {question!r} after {len(request.messages)} messages"
    params = request.params
    system = request.messages[0].content if request.messages[0] != Message("user", question) else ""
    if question == "settings":
        told = f"t={params.temperature} seed={params.seed} stop={params.stop} system={system}"
    return REPLIES.get(question, told)


def load(given: object, report: object) -> ScriptedBackend:
    report("Loading something")  # type: ignore[operator]
    if os.environ.get("BROKEN"):
        raise BackendFailed("There is no model. Get one.")
    info = BackendInfo(
        "Fake", 1000, default_params=SamplingParams(temperature=0.5, max_new_tokens=1000)
    )
    return ScriptedBackend(reply, info=info)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], os.environ, load=load))
