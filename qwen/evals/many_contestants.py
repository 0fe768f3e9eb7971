"""What `qwen.evals.bench_users` compares the web page with: each in a process of its own.

All get the same questions as a chat, and answer with what they took.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qwen.errors import StartupError
from qwen.evals.contestants import THREADS
from qwen.evals.streaming import SYSTEM
from qwen.load_options import LoadOptions
from qwen.messages import ChatRequest, Message, SamplingParams


class OurBackend:
    """This project's backend without the page.

    Args:
        dtype: Of `LoadOptions`: "auto" is 6 bits, "bfloat16" the dense form.
    """

    def __init__(self, dtype: str) -> None:
        import torch

        torch.set_num_threads(THREADS)
        from qwen.local import load_backend

        options: Any = {"device": "cpu", "dtype": dtype}
        self._backend = load_backend("auto", LoadOptions(**options))

    def total_speed(self, questions: Sequence[str], tokens: int) -> float:
        """Return tokens per second of all replies together, asked at once, prompts included."""
        started = time.monotonic()
        with ThreadPoolExecutor(len(questions)) as pool:
            counts = list(pool.map(lambda question: len(self._ask(question, tokens)), questions))
        return sum(counts) / (time.monotonic() - started)

    def speed(self, question: str, tokens: int) -> float:
        """Return tokens per second of one reply after its first token."""
        times = self._ask(question, tokens)
        return (len(times) - 1) / (times[-1] - times[0])

    def _ask(self, question: str, tokens: int) -> list[float]:
        """Ask; returns when each token came."""
        params = SamplingParams(max_new_tokens=tokens, seed=1)
        request = ChatRequest((Message("system", SYSTEM), Message("user", question)), params=params)
        return [
            time.monotonic()
            for event in self._backend.stream(request, threading.Event())
            for _ in event.token_ids
        ]


class LlamaCppSlots:
    """llama.cpp's server, through the wheel xllamacpp, with a slot for each user.

    Args:
        gguf: The file that the embedded weights come from.
    """

    SLOTS = 8

    def __init__(self, gguf: str) -> None:
        try:
            import xllamacpp
        except ImportError:
            raise StartupError(
                "The peer is missing: python -m pip install -r requirements-evals.txt"
            ) from None
        params = xllamacpp.CommonParams()
        params.model.path = gguf
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024 * self.SLOTS, self.SLOTS, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
        params.verbosity = 0
        self._server = xllamacpp.Server(params)

    def total_speed(self, questions: Sequence[str], tokens: int) -> float:
        """See `OurBackend.total_speed`."""
        started = time.monotonic()
        with ThreadPoolExecutor(len(questions)) as pool:
            counts = list(pool.map(lambda question: self._ask(question, tokens), questions))
        return sum(counts) / (time.monotonic() - started)

    def _ask(self, question: str, tokens: int) -> int:
        answer = self._server.handle_chat_completions(
            {
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": question},
                ],
                "max_tokens": tokens,
                "seed": 1,
                "cache_prompt": False,
            }
        )
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        return int(answer["usage"]["completion_tokens"])
