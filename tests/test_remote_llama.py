"""The remote backend, the page and the terminal before a real llama.cpp server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fake_backend import wait_until
from stranger import Stranger

from qwen.errors import EngineFailed, PromptTooLong
from qwen.evals.contestants import embedded_gguf
from qwen.messages import ChatRequest, Message, SamplingParams, StreamEvent
from qwen.remote import OpenAIBackend, open_remote
from qwen.remote_options import RemoteOptions

pytestmark = pytest.mark.integration

PROJECT = Path(__file__).parent.parent
CONTEXT = 1024


class LlamaServer:
    """The server in a process of its own; it may be ended and begun again on the same port."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._gguf = str(embedded_gguf())
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = [sys.executable, str(PROJECT / "tests" / "llama_server.py")]
        self._process = subprocess.Popen(
            [*program, self._gguf, str(self.port), str(CONTEXT)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._answers, 120)

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None
        try:
            return httpx.get(f"{self.url}/models").status_code == 200
        except httpx.TransportError:
            return False

    def is_idle(self) -> bool:
        slots = httpx.get(f"http://127.0.0.1:{self.port}/slots").json()
        return not any(slot["is_processing"] for slot in slots)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaServer]:
    server = LlamaServer()
    server.start()
    yield server
    server.kill()


@pytest.fixture
def backend(llama: LlamaServer) -> Iterator[OpenAIBackend]:
    opened = open_remote(RemoteOptions(llama.url))
    yield opened
    opened.close()


def ask(text: str, *, tokens: int = 8, **params: float) -> ChatRequest:
    return ChatRequest(
        messages=(Message("system", "You are a helpful assistant."), Message("user", text)),
        params=SamplingParams(**{"temperature": 0, "max_new_tokens": tokens} | params),
    )


def take(backend: OpenAIBackend, request: ChatRequest) -> list[StreamEvent]:
    return list(backend.stream(request, threading.Event()))


def text(events: list[StreamEvent]) -> str:
    return "".join(event.text for event in events)


def test_the_model_list_tells_name_and_context(backend):
    assert backend.info.name == "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    assert backend.info.context_length == CONTEXT


def test_a_reply_streams_and_the_count_before_it_is_the_engines_own(backend):
    request = ask("What is the capital of France? One word.")
    events = take(backend, request)
    assert "Paris" in text(events)
    assert len([event for event in events if event.text]) > 1 or len(text(events)) < 8
    assert events[-1].finish_reason == "stop"
    assert events[-1].usage is not None
    assert backend.count_tokens(request).prompt == events[-1].usage.prompt_tokens


def test_length_seed_and_stop_are_honoured(backend):
    cut = take(backend, ask("Count from 1 to 100.", tokens=6))
    assert cut[-1].finish_reason == "length"
    assert cut[-1].usage is not None and cut[-1].usage.completion_tokens == 6
    question = "What is the capital of France? One word."
    stopped = take(backend, ask(question, stop=("ris",)))
    assert (text(stopped), stopped[-1].finish_reason) == ("Pa", "stop")
    drawn = [text(take(backend, ask("A poem", temperature=1.5, seed=5))) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_log_probabilities_belong_to_the_text(backend):
    events = take(backend, ask("Say hello.", tokens=4, top_logprobs=3))
    scored = [found for event in events for found in event.logprobs]
    assert b"".join(found.token for found in scored).decode() == text(events)
    assert all(len(found.top) == 3 and found.logprob <= 0 for found in scored)


def test_a_begun_reply_goes_on_and_is_not_repeated(backend):
    request = ChatRequest(
        messages=(Message("user", "Count from one to ten in words."),),
        reply_prefix="one, two, three,",
        params=SamplingParams(temperature=0, max_new_tokens=4),
    )
    assert text(take(backend, request)).lstrip().startswith("four")


def test_a_raw_prompt_is_completed(backend):
    params = SamplingParams(temperature=0, max_new_tokens=3)
    assert "four" in text(take(backend, ChatRequest(raw_prompt="one two three", params=params)))


def test_a_prompt_beyond_the_context_is_our_error(backend):
    with pytest.raises(PromptTooLong, match=f"{CONTEXT:,}"):
        take(backend, ask("word " * (CONTEXT * 2)))


def test_cancel_frees_the_engine(backend, llama):
    cancel = threading.Event()
    events = []
    for event in backend.stream(ask("Write a very long story.", tokens=900), cancel):
        events.append(event)
        if len(events) == 6:
            cancel.set()
    assert events[-1].finish_reason == "cancelled"
    wait_until(llama.is_idle, 5)


def test_the_terminal_chat_talks_to_it(llama, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "qwen.cli", "--base-url", llama.url, "--seed", "1"],
        input=b"What is 2 + 2? Answer with the number alone.",
        capture_output=True,
        cwd=PROJECT,
        env=os.environ | {"QWEN_CACHE": str(tmp_path)},
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert b"4" in ran.stdout


def test_the_page_talks_to_it_and_survives_its_restart(llama, run_app, open_port):
    app = run_app("--server-port", str(open_port), "--base-url", llama.url)
    app.wait_for("The model is ready")
    app.wait_for(f"Open http://127.0.0.1:{open_port}")
    stranger = Stranger(f"http://127.0.0.1:{open_port}/")
    try:
        strip = stranger.instant("show_status", None, *[None] * 7).text
        assert "qwen2.5-coder" in strip and str(llama.port) not in strip
        assert "Paris" in str(stranger.send("What is the capital of France?", max_new_tokens=20))
        llama.kill()
        failed = str(stranger.send("And of Italy?", max_new_tokens=20))
        assert "The engine does not answer" in failed
        llama.start()
        assert "Rome" in str(stranger.send("And of Italy? One word.", max_new_tokens=20))
    finally:
        stranger.client.close()


def test_an_engine_that_is_killed_in_a_reply_is_an_error_and_the_next_one_works(backend, llama):
    stream = backend.stream(ask("Write a very long story.", tokens=900), threading.Event())
    next(event for event in stream if event.text)
    llama.kill()
    with pytest.raises(EngineFailed):
        list(stream)
    llama.start()
    time.sleep(0.1)
    assert "Paris" in text(take(backend, ask("What is the capital of France? One word.")))
