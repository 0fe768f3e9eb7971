"""What the web page costs: tokens per second through the running app against the backend alone.

`python -m qwen.evals.streaming` starts the app as a process of its own, drives it over HTTP as a
browser would, and alternates with the same request to the backend in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qwen.backend import ChatBackend
from qwen.evals.machine import describe_machine
from qwen.load_options import LoadOptions
from qwen.messages import ChatRequest, Message, SamplingParams

QUESTION = "Explain in detail how a hash table works."
SYSTEM = "You are a helpful assistant."
START_SECONDS = 300


def main() -> None:
    """Print the medians of both ways and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("-c", "--checkpoint-path", default="auto")
    given = parser.parse_args()
    from qwen.local import load_backend

    print(describe_machine("torch", "transformers", "gradio"))
    backend = load_backend(given.checkpoint_path, LoadOptions(device="cpu"))
    with running_app(given.port, given.checkpoint_path) as url:
        ask = connect(url, given.tokens)
        alone, through_page = [], []
        for round_number in range(given.rounds + 1):
            speeds = backend_speed(backend, given.tokens), ask()
            if round_number:  # the first round warms both up
                alone.append(speeds[0])
                through_page.append(speeds[1])
            print(f"backend {speeds[0]:.2f} tok/s, page {speeds[1]:.2f} tok/s", flush=True)
    a, b = statistics.median(alone), statistics.median(through_page)
    print(f"medians: backend {a:.2f}, page {b:.2f}, ratio {b / a:.3f} (target at least 0.90)")


def backend_speed(backend: ChatBackend, tokens: int) -> float:
    """Return tokens per second of the decode loop for one reply."""
    params = SamplingParams(temperature=0, max_new_tokens=tokens, seed=1)
    request = ChatRequest((Message("system", SYSTEM), Message("user", QUESTION)), params=params)
    times = [
        time.monotonic()
        for event in backend.stream(request, threading.Event())
        if event.text or event.finish_reason
    ]
    return (tokens - 1) / (times[-1] - times[0])


@contextmanager
def running_app(port: int, checkpoint: str) -> Iterator[str]:
    """Run the web app until it is ready; yields its address."""
    with app_process(port, checkpoint) as (url, _):
        yield url


@contextmanager
def app_process(port: int, checkpoint: str) -> Iterator[tuple[str, int]]:
    """Run the web app until it is ready; yields its address and the id of its process."""
    arguments = ["--cpu-only", "-c", checkpoint, "--server-port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-u", "app.py", *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        deadline = time.monotonic() + START_SECONDS
        url = f"http://127.0.0.1:{port}/"
        for line in process.stdout:
            if "The model is ready" in line:
                break
            if time.monotonic() > deadline:
                raise SystemExit("The app did not become ready.")
        urllib.request.urlopen(url).close()
        threading.Thread(target=process.stdout.read, daemon=True).start()  # or it would block
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def connect(url: str, tokens: int) -> Callable[[], float]:
    """Return a function that asks the page once and returns the tokens per second seen."""
    import httpx

    client = httpx.Client(base_url=url + "gradio_api/queue/", timeout=None)
    config = httpx.get(url + "config").json()
    event, chatbot = send_event(config)

    def ask() -> float:
        page = uuid.uuid4().hex
        # The message, the browser's storage, the page's session, the controls in their order.
        values = [QUESTION, None, None, SYSTEM, 0, 0.8, 20, 1.05, tokens, 1]
        client.post(
            "join", json={"data": values, "fn_index": event, "session_hash": page}
        ).raise_for_status()
        times = []
        with client.stream("GET", "data", params={"session_hash": page}) as lines:
            for message in page_messages(lines.iter_lines()):
                if message["msg"] == "process_generating" and _changes(message, chatbot):
                    times.append(time.monotonic())
                if message["msg"] == "process_completed":
                    break
        # The first two changes are the question and the note that it is being read.
        return (tokens - 1) / (times[-1] - times[2])

    return ask


def page_messages(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield what the page's stream of events says."""
    for line in lines:
        if line.startswith("data:"):
            yield json.loads(line[5:])


def send_event(config: dict[str, Any]) -> tuple[int, int]:
    """Return the number of the Send event and the place of the chat among its outputs."""
    ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
    for event in config["dependencies"]:
        if [ids["send"], "click"] in [list(target) for target in event["targets"]]:
            return event["id"], event["outputs"].index(ids["chat"])
    raise SystemExit("The page has no Send button.")


def _changes(message: dict[str, Any], place: int) -> bool:
    """Tell whether a message changes an output; later messages hold only differences."""
    data = message["output"]["data"]
    return bool(data) and data[place] not in ([], None, {"__type__": "update"})


if __name__ == "__main__":
    main()
