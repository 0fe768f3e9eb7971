"""Keys, origins, limits and the log of the API, on a real socket."""

import asyncio
import base64
import io
import json
import logging
import socket
import threading

import httpx
import pytest
from api_server import HELLO
from argon2 import PasswordHasher
from fake_backend import FakeBackend, wait_until
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse
from tiny_model import build_byte_tokenizer, build_tiny_model

from qwen.engine import _MAX_RUNNING
from qwen.load_options import LoadOptions
from qwen.local import build_backend
from qwen.messages import StreamEvent, Usage
from qwen.serving_limits import ServingLimits
from webapp.api_auth import AccessControl
from webapp.api_limits import WAITING_KEYS, BodyLimit, KeyCheck
from webapp.logs import set_up_logs
from webapp.settings import ApiOptions


def basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def status_with(api, header, path="/v1/models"):
    headers = {} if header is None else {"authorization": header}
    return api.client.get(path, headers=headers).status_code


def test_without_keys_everybody_is_let_in_whatever_they_send(serve_api):
    api = serve_api(FakeBackend())
    assert [status_with(api, header) for header in (None, "Bearer none")] == [200, 200]


def test_key_opens_what_is_closed_without_it(serve_api):
    api = serve_api(FakeBackend(), keys=("one", "two"))
    wrong = (None, "", "Bearer", "Bearer three", "Bearer on", "Basic one", "one", basic("one", ""))
    assert [status_with(api, header) for header in wrong] == [401] * len(wrong)
    assert [status_with(api, f"{word} two") for word in ("Bearer", "bearer")] == [200, 200]
    assert status_with(api, None, "/metrics") == 401
    assert status_with(api, None, "/health") == 200
    answer = api.client.get("/v1/models")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_refused_request_never_reaches_the_model(serve_api):
    assert serve_api(backend := FakeBackend(), keys=("one",)).chat().status_code == 401
    assert not backend.requests


def test_crowd_with_wrong_keys_leaves_the_threads_to_replies():
    done = threading.Event()
    access = AccessControl(keys=["one"])
    access.allows = lambda header: done.wait(20) and False  # type: ignore[method-assign]
    answers = []

    async def send(message):
        answers.append(message.get("status", 0))

    async def crowd():
        check = KeyCheck(PlainTextResponse(), access=access, open_paths=())
        scope = {"type": "http", "path": "/", "headers": [(b"authorization", b"Bearer wrong")]}
        asking = [asyncio.create_task(check(scope, None, send)) for _ in range(300)]
        try:
            assert await asyncio.wait_for(run_in_threadpool(lambda: "reply"), 10) == "reply"
        finally:
            done.set()
            await asyncio.gather(*asking)

    asyncio.run(crowd())
    assert answers.count(401) == WAITING_KEYS
    assert answers.count(429) == 300 - WAITING_KEYS


def test_login_opens_as_in_the_reference(serve_api):
    api = serve_api(FakeBackend(), login=("me", "pa:ss"))
    assert status_with(api, basic("me", "pa:ss")) == 200
    wrong = (basic("me", "pa"), basic("you", "pa:ss"), "Basic %%%", "Bearer pa:ss")
    assert [status_with(api, header) for header in wrong] == [401] * 4


def test_pages_login_closes_the_api_where_no_key_is_set(serve_api):
    api = serve_api(FakeBackend(), auth=("me", "pass"))
    assert status_with(api, None) == 401
    assert status_with(api, basic("me", "pass")) == 200


def test_pages_login_closes_the_api_beside_the_page_too(serve_page):
    url = serve_page(FakeBackend(), auth=("me", "pass"))
    assert httpx.get(url + "v1/models").status_code == 401
    assert httpx.get(url + "v1/models", auth=("me", "pass")).status_code == 200


def test_key_may_be_given_as_its_hash():
    access = AccessControl(keys=[PasswordHasher(time_cost=1, memory_cost=64).hash("secret")])
    assert access.allows("Bearer secret")
    assert not access.allows("Bearer other")


def test_right_key_is_hashed_once_and_never_kept():
    access = AccessControl(keys=["secret-key"])
    assert not access.remembers("Bearer secret-key")
    assert access.allows("Bearer secret-key")
    assert access.remembers("Bearer secret-key")
    assert not access.remembers("Bearer secret-keY")
    assert "secret-key" not in repr(vars(access))


def test_api_beside_the_page_and_none_where_it_is_switched_off(serve_page):
    from webapp.settings import ApiOptions

    url = serve_page(FakeBackend(), api=ApiOptions(mode="none"))
    assert httpx.get(url).status_code == 200
    assert httpx.get(url + "v1/models").status_code == 404


def test_page_and_api_share_a_port(serve_page):
    url = serve_page(FakeBackend("alpha"))
    assert "<html" in httpx.get(url).text
    assert httpx.get(url + "health").json() == {"status": "ok"}
    answer = httpx.post(url + "v1/chat/completions", json=HELLO | {"stream": True})
    assert "alpha" in answer.text
    assert "content-encoding" not in answer.headers
    assert "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
def test_other_sites_pages_may_not_use_the_api(serve_api, serve_page, origin):
    backend = FakeBackend()
    answer = serve_api(backend).client.post(
        "/v1/chat/completions", json=HELLO, headers={"origin": origin}
    )
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert not backend.requests


def test_named_origin_may_use_the_api_and_no_other(serve_api):
    api = serve_api(FakeBackend(), cors_origins=("https://good.example",), keys=("one",))
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "x"}
    for origin, allowed in (("https://good.example", True), ("https://evil.example", False)):
        answer = api.client.options("/v1/chat/completions", headers=asked | {"origin": origin})
        assert (answer.headers.get("access-control-allow-origin") == origin) == allowed
    headers = {"origin": "https://good.example", "authorization": "Bearer one"}
    answer = api.client.get("/v1/models", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://good.example"


def test_form_of_another_site_is_no_request(serve_api):
    api = serve_api(backend := FakeBackend())
    answer = api.client.post(
        "/v1/chat/completions",
        content=json.dumps(HELLO),
        headers={"content-type": "text/plain"},
    )
    assert answer.status_code == 400
    assert not backend.requests


def test_too_large_a_body_is_refused_with_and_without_a_length(serve_api):
    api = serve_api(backend := FakeBackend(), max_request_bytes=2000)
    body = json.dumps(HELLO | {"user": "x" * 3000}).encode()
    answers = [
        api.client.post("/v1/chat/completions", content=content)
        for content in (body, iter([body[:1500], body[1500:]]))
    ]
    assert [answer.status_code for answer in answers] == [413, 413]
    assert "larger than 2,000 bytes" in answers[0].json()["error"]["message"]
    assert not backend.requests
    assert api.chat().status_code == 200


def test_slow_body_is_given_up():
    sent = []

    async def never():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "headers": []}
    limit = BodyLimit(None, max_bytes=10, seconds=0.05)
    asyncio.run(limit(scope, never, send))
    assert sent[0]["status"] == 408


def open_streams(api, number):
    """Begin streamed replies and leave them open; returns their sockets."""
    body = json.dumps(HELLO | {"stream": True}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    sockets = []
    for _ in range(number):
        one = socket.create_connection(("127.0.0.1", int(api.url.rsplit(":", 1)[1])))
        one.sendall(head.encode() + body)
        sockets.append(one)
    return sockets


def test_client_over_its_number_of_requests_is_told_when_to_come_back(serve_api):
    api = serve_api(backend := FakeBackend("a b"), max_requests_per_client=2)
    backend.gate.clear()
    sockets = open_streams(api, 2)
    wait_until(lambda: backend.active == 2)
    answer = api.chat()
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert "At most 2 requests" in answer.json()["error"]["message"]
    assert api.client.get("/v1/models").status_code == 200
    backend.gate.set()
    wait_until(lambda: not backend.active)
    wait_until(lambda: api.chat().status_code == 200)
    for one in sockets:
        one.close()


def test_server_over_its_number_of_requests_says_so(serve_api):
    api = serve_api(backend := FakeBackend("a b"), max_requests=1)
    backend.gate.clear()
    (one,) = open_streams(api, 1)
    wait_until(lambda: backend.active)
    answer = api.chat()
    assert (answer.status_code, "busy" in answer.text) == (429, True)
    one.close()


def test_full_queue_says_which_place_it_would_be_and_when_to_come_back(serve_api):
    limits = ServingLimits(max_running=1, max_waiting=2)
    backend = build_backend(
        build_tiny_model(), build_byte_tokenizer(), LoadOptions(limits=limits), name="Tiny"
    )
    engine = backend._engine
    api = serve_api(backend)
    go, read_many = threading.Event(), engine._scheduler._readers.read
    engine._scheduler._readers.read = lambda readings: go.wait(20) and read_many(readings)
    sockets = open_streams(api, 3)
    wait_until(lambda: engine.load == (1, 2))
    answer = api.chat()
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    message = answer.json()["error"]["message"]
    seconds = int(answer.headers["retry-after"])
    assert f"would be number 3. Try again in {seconds} seconds." in message and seconds >= 1
    go.set()
    for one in sockets:
        one.close()
    wait_until(lambda: engine.load == (0, 0))
    assert api.chat().status_code == 200


def test_api_lets_in_as_many_as_run_and_wait():
    most_running = max(_MAX_RUNNING.values())
    assert ApiOptions().max_requests > most_running + ServingLimits().max_waiting


def test_many_waiting_replies_do_not_keep_the_running_one_from_going_on(serve_api):
    """Each waiting reply holds a thread; with too few of them the server would stand still."""
    turn = threading.Lock()

    class OneAtATime(FakeBackend):
        def _events(self, request, cancel):
            while not turn.acquire(timeout=0.01):
                if cancel.is_set():
                    return
            try:
                yield from super()._events(request, cancel)
            finally:
                turn.release()

    api = serve_api(backend := OneAtATime("a b"), max_requests=90, max_requests_per_client=90)
    backend.gate.clear()
    sockets = open_streams(api, 80)
    wait_until(lambda: backend.active == 80)
    backend.gate.set()
    wait_until(lambda: not backend.active)
    for one in sockets:
        one.close()


def test_client_that_reads_nothing_holds_no_slot(serve_api):
    words = " ".join(["word" * 500] * 4000)
    api = serve_api(backend := FakeBackend(words, limit=10**6))
    body = json.dumps(HELLO | {"stream": True, "max_tokens": 10_000}).encode()
    (one,) = open_streams(api, 0) or [socket.socket()]
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.connect(("127.0.0.1", int(api.url.rsplit(":", 1)[1])))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    one.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    wait_until(lambda: backend.requests)
    wait_until(lambda: not backend.active)  # 8 MB were made; the client took next to nothing
    assert api.chat(max_tokens=1).status_code == 200
    one.close()


def test_clock_that_jumps_back_does_not_matter(serve_api, monkeypatch):
    api = serve_api(FakeBackend("a b"))
    monkeypatch.setattr("time.time", lambda: 0.0)
    body = api.chat().json()
    assert body["created"] == 0
    assert body["choices"][0]["message"]["content"] == "a b"
    monkeypatch.undo()
    assert 0 <= api.figure("qwen_reply_seconds_sum") < 60


SECRET = "Zanzibar-7731"


@pytest.mark.parametrize("form", ["text", "json"])
def test_log_has_a_line_for_each_request_and_nobodys_text(serve_api, form):
    lines = io.StringIO()
    handler = set_up_logs(form, stream=lines)
    try:
        api = serve_api(FakeBackend(SECRET), keys=("one",))
        api.client.headers["authorization"] = "Bearer one"
        api.chat(messages=[{"role": "user", "content": SECRET}])
        api.chat(**{SECRET: 1})
        api.chat(model=SECRET)
        api.client.get(f"/v1/{SECRET}", params={"q": SECRET})
        api.client.post("/v1/completions", content=SECRET)
        api.client.headers["authorization"] = f"Bearer {SECRET}"
        api.chat()
        wait_until(lambda: lines.getvalue().count("/v1/chat/completions") == 4)
    finally:
        logging.getLogger().removeHandler(handler)
    text = lines.getvalue()
    assert SECRET not in text
    if form == "json":
        told = [json.loads(line) for line in text.splitlines()]
        requests = [one for one in told if one["message"] == "request"]
        assert {200, 400, 401, 404} <= {one["status"] for one in requests}
        assert all({"time", "level", "logger", "seconds"} <= set(one) for one in requests)
        assert [one["finish"] for one in told if one["message"] == "reply"] == ["stop"]
    else:
        assert "path=/v1/chat/completions status=200" in text
        assert "completion_tokens=1" in text


class ClosableBackend(FakeBackend):
    """Says a word and then nothing; ends its replies when it is closed, as the engine does."""

    def _events(self, request, cancel):
        yield StreamEvent(context=self.count_tokens(request))
        yield StreamEvent(text="one ")
        while not self.closed and not cancel.wait(0.01):
            pass
        yield StreamEvent(finish_reason="cancelled", usage=Usage(1, 1))


def ask_in_background(api, answers, **fields):
    asking = threading.Thread(target=lambda: answers.append(api.chat(**fields)))
    asking.start()
    return asking


def test_stopping_server_lets_running_replies_end_and_begins_none(serve_api):
    api = serve_api(backend := FakeBackend("one two three"))
    backend.gate.clear()
    asking = ask_in_background(api, answers := [], stream=True)
    wait_until(lambda: backend.active)
    api.activity.stop()
    assert api.chat().status_code == 503
    assert not api.activity.wait_until_idle(0.05)
    backend.gate.set()
    assert api.activity.wait_until_idle(20)
    asking.join()
    assert "three" in answers[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_reply_that_the_stopping_server_cuts_says_so(serve_api, stream):
    api = serve_api(backend := ClosableBackend())
    asking = ask_in_background(api, answers := [], stream=stream)
    wait_until(lambda: api.figure("qwen_replies_running"))
    backend.close()
    asking.join()
    assert "cut because the server is stopping" in answers[0].text
    assert ("one " in answers[0].text) == stream
    assert answers[0].status_code == (200 if stream else 503)
