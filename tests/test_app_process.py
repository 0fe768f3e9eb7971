"""`python app.py` in a process of its own: how it starts, what it prints, how it ends."""

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from conftest import RunningApp
from fake_backend import wait_until
from stranger import Stranger, controls
from tiny_checkpoint import write_tiny_folder

#: No request of these tests leaves the machine: nobody listens there.
NOWHERE = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9") | {
    "NO_PROXY": "127.0.0.1,localhost"
}
MARKER = "Zanzibar-7731"


@pytest.fixture(scope="module")
def endless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with so much context that a greedy reply goes on for minutes."""
    folder = write_tiny_folder(tmp_path_factory.mktemp("tiny"))
    config = folder / "config.json"
    values = json.loads(config.read_text("utf-8")) | {"max_position_embeddings": 32_768}
    config.write_text(json.dumps(values), "utf-8")
    return folder


def start_page(run_app: Callable[..., RunningApp], port: int, *arguments: str) -> RunningApp:
    """Start the app and wait until its page can be opened."""
    app = run_app("--server-port", str(port), "--cpu-only", *arguments, env=NOWHERE)
    app.wait_for(f"Open http://127.0.0.1:{port}")
    return app


@pytest.fixture
def writing_app(run_app, open_port, endless_folder) -> Iterator[RunningApp]:
    """The app while it writes an endless reply to a message that holds `MARKER`."""
    app = start_page(run_app, open_port, "-c", str(endless_folder))
    app.wait_for("The model is ready")
    stranger = Stranger(f"http://127.0.0.1:{open_port}/")
    with stranger.sending(MARKER, temperature=0, max_new_tokens=8192) as growing:
        for _ in range(8):
            assert next(growing)["msg"] in ("estimation", "process_starts", "process_generating")
        yield app
    stranger.client.close()


def test_help_lists_the_flags_and_does_not_load_anything(run_app):
    app = run_app("--help")
    assert app.process.wait(timeout=60) == 0
    wait_until(lambda: "--auth" in app.output)
    for flag in ("-c", "--checkpoint-path", "--cpu-only", "--share", "--inbrowser"):
        assert flag in app.output
    assert "Loading" not in app.output


def test_wrong_flag_ends_with_code_2_and_names_it(run_app):
    app = run_app("--server-port", "many")
    assert app.process.wait(timeout=60) == 2
    wait_until(lambda: "'many' is not a port" in app.output)


def test_taken_port_ends_with_code_1_and_one_sentence(run_app):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        app = run_app("--server-port", port, "-c", "/nonexistent/folder")
        assert app.process.wait(timeout=60) == 1
    wait_until(lambda: "--server-port" in app.output)
    assert f"Port {port} on 127.0.0.1 cannot be used" in app.output
    assert "Traceback" not in app.output


def test_unknown_model_is_named_and_the_page_stays_up(run_app, open_port):
    app = start_page(run_app, open_port, "-c", "./no-such-folder")
    app.wait_for("Error: ")
    assert "no-such-folder" in app.output
    assert httpx.get(f"http://127.0.0.1:{open_port}/").status_code == 200
    assert "Traceback" not in app.output


def test_folder_without_weights_is_named_and_the_page_says_so(run_app, open_port, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', "utf-8")
    app = start_page(run_app, open_port, "-c", str(tmp_path))
    app.wait_for("Error: ")
    assert str(tmp_path) in app.output
    assert "Traceback" not in app.output
    stranger = Stranger(f"http://127.0.0.1:{open_port}/")
    shown = stranger.instant("show_status", None, *controls()).text
    stranger.client.close()
    assert "could not be loaded" in shown
    assert tmp_path.name in shown


def test_failed_hub_is_explained_in_one_sentence(run_app, open_port):
    app = start_page(run_app, open_port, "-c", "Qwen/No-Such-Model")
    app.wait_for("Error: ")
    assert "Qwen/No-Such-Model" in app.output
    assert "Traceback" not in app.output


def test_share_without_a_login_warns_and_the_local_page_works_without_the_share(run_app, open_port):
    app = start_page(run_app, open_port, "-c", "./no-such-folder", "--share")
    assert "--share without --auth" in app.output
    app.wait_for("no public link could be made")
    assert httpx.get(f"http://127.0.0.1:{open_port}/").status_code == 200


def test_login_guards_the_page_and_every_endpoint(run_app, open_port):
    start_page(run_app, open_port, "-c", "./no-such-folder", "--auth", "ann:secret-word")
    with httpx.Client(base_url=f"http://127.0.0.1:{open_port}/") as client:
        page = client.get("")
        assert "open_page" not in page.text
        assert "secret-word" not in page.text
        body = {"fn_index": 0, "data": [], "session_hash": "x"}
        assert client.get("config").status_code == 401
        assert client.post("gradio_api/queue/join", json=body).status_code == 401
        assert client.post("gradio_api/run/predict", json=body).status_code == 401
        assert client.get("gradio_api/queue/data?session_hash=x").status_code == 401
        wrong = client.post("login", data={"username": "ann", "password": "guess"})
        assert wrong.status_code == 400
        right = client.post("login", data={"username": "ann", "password": "secret-word"})
        assert right.status_code == 200
        assert client.get("config").status_code == 200


def seconds_to_end(app: RunningApp, stop: signal.Signals) -> float:
    """Stop the app, which must end in peace; return how long that takes."""
    begun = time.monotonic()
    app.process.send_signal(stop)
    assert app.process.wait(timeout=60) == 0
    seconds = time.monotonic() - begun
    wait_until(lambda: "Stopping" in app.output)
    assert "Traceback" not in app.output
    assert "terminate" not in app.output
    return seconds


def test_ctrl_c_while_writing_ends_in_under_three_seconds(writing_app):
    assert seconds_to_end(writing_app, signal.SIGINT) < 3


def test_termination_while_loading_ends_in_under_three_seconds(run_app, open_port, endless_folder):
    app = start_page(run_app, open_port, "-c", str(endless_folder))
    assert "The model is ready" not in app.output
    assert seconds_to_end(app, signal.SIGTERM) < 3


def test_users_text_is_not_printed(writing_app, open_port):
    stranger = Stranger(f"http://127.0.0.1:{open_port}/")
    for text, top_k in ((f"refused {MARKER}", 1.5), (MARKER * 100_000, 5)):
        stranger.send(text, top_k=top_k)
        assert 'role="alert"' in stranger.follow(top_k=top_k)["notice"]
    stranger.instant("undo", MARKER, None, None, *controls(system_prompt=MARKER))
    stranger.client.close()
    seconds_to_end(writing_app, signal.SIGINT)
    assert MARKER not in writing_app.output
