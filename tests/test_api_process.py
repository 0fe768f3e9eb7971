"""`python app.py` with the API in a process of its own: what it imports, how it stops."""

import json
import signal
import subprocess
import sys
import threading

import httpx
import pytest
from fake_backend import wait_until
from test_app_process import MARKER, NOWHERE, endless_folder  # noqa: F401 - a fixture

from webapp.settings import parse_settings

GRADIO_IS_BLOCKED = """
import sys
sys.modules["gradio"] = None  # any import of it fails
from app import main, end_process
end_process(main())
"""


def ask(port, answers, **fields):
    """Begin an endless reply on a thread of its own."""
    body = {"messages": [{"role": "user", "content": MARKER}], "temperature": 0} | fields
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    asking = threading.Thread(target=lambda: answers.append(httpx.post(url, json=body, timeout=60)))
    asking.start()
    return asking


def is_healthy(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").is_success
    except httpx.TransportError:
        return False


@pytest.fixture
def serving(run_app, open_port, endless_folder):  # noqa: F811
    def start(*arguments):
        app = run_app(
            "-c", str(endless_folder), "--cpu-only", "--server-port", str(open_port), *arguments,
            env=NOWHERE,
        )  # fmt: skip
        wait_until(lambda: is_healthy(open_port) or app.process.poll() is not None, 120)
        assert app.process.poll() is None, app.output
        return app

    return start


def test_api_alone_needs_no_gradio(open_port, endless_folder):  # noqa: F811
    flags = ["-c", str(endless_folder), "--cpu-only", "--api-only", "--server-port", str(open_port)]
    process = subprocess.Popen(
        [sys.executable, "-c", GRADIO_IS_BLOCKED, *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: is_healthy(open_port) or process.poll() is not None, 120)
        assert httpx.get(f"http://127.0.0.1:{open_port}/v1/models").is_success
        assert httpx.get(f"http://127.0.0.1:{open_port}/").status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("mode", [(), ("--api-only",)])
@pytest.mark.parametrize("stream", [True, False])
def test_reply_that_runs_when_the_server_is_stopped_is_cut_with_a_notice(
    serving, open_port, mode, stream
):
    app = serving("--stop-seconds", "0.2", *mode)
    asking = ask(open_port, answers := [], stream=stream, max_tokens=30_000)
    metrics = f"http://127.0.0.1:{open_port}/metrics"
    wait_until(lambda: "qwen_replies_running 1.0" in httpx.get(metrics).text)
    app.process.send_signal(signal.SIGTERM)
    assert app.process.wait(timeout=20) == 0
    asking.join()
    assert "server is stopping" in answers[0].text
    assert MARKER not in app.output
    assert "Traceback" not in app.output


def test_reply_that_ends_in_time_is_whole(serving, open_port):
    app = serving("--stop-seconds", "60", "--api-only", "--log-format", "json")
    asking = ask(open_port, answers := [], stream=True, max_tokens=400)
    metrics = f"http://127.0.0.1:{open_port}/metrics"
    wait_until(lambda: "qwen_replies_running 1.0" in httpx.get(metrics).text)
    app.process.send_signal(signal.SIGTERM)
    assert app.process.wait(timeout=60) == 0
    asking.join()
    assert answers[0].text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in answers[0].text
    lines = [json.loads(line) for line in app.lines if line.startswith("{")]
    assert [line["finish"] for line in lines if line["message"] == "reply"] == ["length"]


def test_taken_port_of_the_api_alone_is_one_sentence(serving, run_app, open_port):
    serving("--api-only")
    second = run_app("--api-only", "--server-port", str(open_port), "-c", "/nonexistent")
    assert second.process.wait(timeout=60) == 1
    wait_until(lambda: f"Port {open_port} on 127.0.0.1 cannot be used" in second.output)
    assert "Traceback" not in second.output


def test_api_flags_are_read():
    flags = ["--api-only", "--api-key", "a", "--api-key", "b", "--cors-origin", "https://x.org"]
    api = parse_settings([*flags, "--api-auth", "u:p:q", "--max-requests", "3"], {}).api
    assert (api.mode, api.keys, api.login) == ("only", ("a", "b"), ("u", "p:q"))
    assert (api.cors_origins, api.max_requests) == (("https://x.org",), 3)
    assert parse_settings(["--no-api"], {}).api.mode == "none"


def test_keys_may_come_from_the_environment_and_are_not_shown():
    settings = parse_settings([], {"QWEN_API_KEY": "sekret", "QWEN_API_AUTH": "u:passw"})
    assert (settings.api.keys, settings.api.login) == (("sekret",), ("u", "passw"))
    assert "sekret" not in repr(settings) and "passw" not in repr(settings)


def test_frames_are_left_to_the_platforms_and_closed_elsewhere():
    assert parse_settings([], {}).frame_ancestors == "'self'"
    assert parse_settings([], {"SPACE_ID": "a/b"}).frame_ancestors is None
    assert parse_settings([], {"MODELSCOPE_ENVIRONMENT": "studio"}).frame_ancestors is None
    given = parse_settings(["--frame-ancestors", "'self' https://x.org:80/*"], {"SPACE_ID": "a"})
    assert given.frame_ancestors == "'self' https://x.org:80/*"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--api-only", "--no-api"], "--no-api"),
        (["--api-key", ""], "--api-key"),
        (["--api-auth", "nopassword"], "QWEN_API_AUTH"),
        (["--cors-origin", "https://x.org/path"], "origin"),
        (["--cors-origin", "x"], "origin"),
        (["--frame-ancestors", "a; script-src *"], "--frame-ancestors"),
        (["--frame-ancestors", "a\r\nx: y"], "--frame-ancestors"),
        (["--frame-ancestors", ""], "--frame-ancestors"),
        (["--max-request-mb", "0"], "above 0"),
        (["--max-requests", "-1"], "above 0"),
        (["--stop-seconds", "nan"], "seconds"),
        (["--stop-seconds", "-1"], "seconds"),
        (["--log-format", "xml"], "xml"),
    ],
)
def test_wrong_value_is_named(argv, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_settings(argv, {})
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err
