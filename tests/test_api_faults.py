"""What hostile, broken and vanishing clients do to the API: nothing that lasts."""

import asyncio
import contextlib
import gc
import json
import random
import socket
import struct
import threading
import time

import httpx
import pytest
import schemathesis
from api_server import HELLO
from fake_backend import FakeBackend, wait_until
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from qwen.messages import StreamEvent
from webapp.api_stream import ReplyResponse, _Inbox

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


class SlowBackend(FakeBackend):
    """Needs `seconds` for each word, during which it notices nothing, as a model does."""

    def __init__(self, words=1000, *, seconds=0.1):
        super().__init__()
        self.words = words
        self.seconds = seconds
        self.said = 0

    def _events(self, request, cancel):
        yield StreamEvent(context=self.count_tokens(request))
        for _ in range(self.words):
            time.sleep(self.seconds)
            if cancel.is_set():
                return
            self.said += 1
            yield StreamEvent(text="word ")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_client_that_disconnects_frees_its_slot_within_one_token(serve_api, path, stream):
    api = serve_api(backend := SlowBackend())
    body = {"stream": stream} | ({"prompt": "x"} if path == "completions" else HELLO)
    client = httpx.Client(timeout=60)

    def ask():
        with contextlib.suppress(httpx.TransportError, httpx.StreamError, RuntimeError):
            client.post(f"{api.url}/v1/{path}", json=body)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    wait_until(lambda: backend.said >= 3)
    for connection in client._transport._pool.connections:  # type: ignore[attr-defined]
        connection._connection._network_stream._sock.shutdown(socket.SHUT_RDWR)
    said = backend.said
    wait_until(lambda: not backend.active, seconds=5)
    assert backend.said <= said + 1
    asking.join()
    client.close()


def test_client_that_disconnects_while_its_reply_waits_leaves_the_queue(serve_api):
    api = serve_api(backend := FakeBackend("a b"))
    backend.gate.clear()
    one = send_request(api, stream=True)
    wait_until(lambda: backend.active)
    one.close()
    wait_until(lambda: not backend.active, seconds=5)


def send_request(api, *, length=None, **fields):
    """Send a request on a socket of its own; with `length`, only so many bytes of it."""
    body = json.dumps(HELLO | fields).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    one = socket.create_connection(("127.0.0.1", int(api.url.rsplit(":", 1)[1])))
    one.sendall((head.encode() + body)[:length])
    return one


def reset(one):
    """Close a connection at once, as a machine that fails does."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()


def living():
    """Whatever a request keeps alive while it is under way."""
    gc.collect()
    kinds = (ReplyResponse, _Inbox, asyncio.Task)
    return [one for one in gc.get_objects() if type(one) in kinds]


def test_storm_of_disconnects_leaks_no_slot_thread_task_or_memory(serve_api):
    api = serve_api(backend := FakeBackend("word " * 50, pause=0.002), max_requests_per_client=1000)
    chance = random.Random(7)
    api.chat()
    server = api.running._server
    threads, tasks = threading.active_count(), len(server.server_state.tasks)
    before = set(map(id, living()))
    for _ in range(10):
        sockets = []
        for _ in range(20):
            length = chance.choice([None, None, None, chance.randrange(1, 200)])
            sockets.append(send_request(api, length=length, stream=chance.random() < 0.7))
        time.sleep(chance.random() * 0.05)
        for one in sockets:
            chance.choice([reset, socket.socket.close])(one)
    wait_until(lambda: not backend.active and not api.activity.num_open)
    wait_until(lambda: len(server.server_state.tasks) <= tasks)
    assert api.figure("qwen_replies_running") == api.figure("qwen_replies_queued") == 0
    wait_until(lambda: not set(map(id, living())) - before)
    # Idle worker threads of the event loop are kept for the next requests, and no more than it has.
    workers = [t for t in threading.enumerate() if "worker" in t.name.lower()]
    assert threading.active_count() - threads <= len(workers)
    assert api.chat().json()["choices"][0]["message"]["content"].startswith("word")


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /v1/%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request_are_refused_and_the_server_goes_on(serve_api, data):
    api = serve_api(FakeBackend())
    address = ("127.0.0.1", int(api.url.rsplit(":", 1)[1]))
    with socket.create_connection(address, 20) as one, contextlib.suppress(OSError):
        one.sendall(data)
        answer = one.recv(65536)
        assert answer.split(b" ")[1][:1] == b"4"
        assert b"root:" not in answer
    assert api.chat().status_code == 200


@pytest.mark.parametrize(
    ("operation", "mode"),
    [
        ("chat/completions", GenerationMode.POSITIVE),
        ("chat/completions", GenerationMode.NEGATIVE),
        ("completions", GenerationMode.POSITIVE),
        ("completions", GenerationMode.NEGATIVE),
        ("models/{model}", GenerationMode.POSITIVE),
    ],
)
def test_no_request_that_can_be_made_of_the_schema_fails_the_server(serve_api, operation, mode):
    api = serve_api(FakeBackend("alpha beta", limit=10**6), max_request_bytes=2**20)
    schema = schemathesis.openapi.from_url(f"{api.url}/v1/openapi.json")
    method = "GET" if operation.startswith("models") else "POST"
    answered = set()

    @given(case=schema[f"/v1/{operation}"][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    def send(case):
        answer = case.call()
        answered.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)

    send()
    assert max(answered) < 500
    if mode == GenerationMode.POSITIVE and operation == "completions":
        assert 200 in answered
