"""What is known of a remote model and of a reply that it is writing.

Plain values; knows neither HTTP nor the client.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwen.backend import BackendInfo, ListedModel
from qwen.messages import FinishReason, SamplingParams, StreamEvent, Timing, Usage
from qwen.remote_engines import RemoteModel, name_models
from qwen.remote_wire import Chunk


def build_info(models: Sequence[RemoteModel]) -> BackendInfo:
    """Say what a page shows of an engine's models, the one that answers first.

    The engine's address is nobody's business there.
    """
    model, *others = models
    notices = []
    if model.kind.no_top_k is None:
        notices.append(
            "This engine is not known to take top-k and repetition penalty; they are left to it."
        )
    if others:
        notices.append(f"The engine also has {name_models(others)}; --model chooses at start.")
    longest = min(1024, model.context_length // 4) if model.context_length else 1024
    return BackendInfo(
        name=model.name,
        context_length=model.context_length,
        device=f"remote engine ({model.kind.name})" if model.kind.name else "remote engine",
        dtype="",
        default_params=replace(SamplingParams(), max_new_tokens=max(longest, 1)),
        notices=tuple(notices),
        other_models=tuple(ListedModel(other.name, other.context_length) for other in others),
    )


@dataclass
class RemoteReply:
    """What is known of a running reply; times are seconds of the monotonic clock."""

    asked: float
    prompt_tokens: int
    pieces: int = 0
    first: float = 0.0
    last: float = 0.0
    finish_reason: FinishReason = "stop"
    usage: Usage | None = None

    def add(self, chunk: Chunk) -> StreamEvent | None:
        """Take a chunk; return what a reader gets of it."""
        self.usage = chunk.usage or self.usage
        self.finish_reason = chunk.finish_reason or self.finish_reason
        if not chunk.says_something:
            return None
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.pieces += 1
        return StreamEvent(
            text=chunk.text,
            logprobs=chunk.logprobs,
            tool_calls=chunk.tool_calls,
            reasoning=chunk.reasoning,
        )

    def final(self, *, cancelled: bool) -> StreamEvent:
        """Return the last event. Where the engine did not count, a piece is taken for a token."""
        usage = self.usage or Usage(self.prompt_tokens, self.pieces)
        seconds = self.last - self.first
        speed = (usage.completion_tokens - 1) / seconds if seconds > 0 else 0.0
        return StreamEvent(
            finish_reason="cancelled" if cancelled else self.finish_reason,
            usage=usage,
            timing=Timing((self.first or time.monotonic()) - self.asked, max(speed, 0.0)),
        )
