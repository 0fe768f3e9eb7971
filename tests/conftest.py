"""Fixtures that several test modules share: a browser, the embedded model, a running page."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import interpreted_kernels  # noqa: F401  before all others
import pytest

# isort: split
from api_server import ApiServer, ServeApi, api_settings
from fake_backend import FakeBackend, ready, wait_until

from qwen.backend import DeferredBackend
from qwen.load_options import LoadOptions
from qwen.local import LocalBackend, load_backend
from webapp.server import launch_page
from webapp.settings import Settings

if TYPE_CHECKING:  # the tests without a browser run where Playwright is not installed
    from playwright.sync_api import Browser

    from qwen.cpu_kernels import CpuKernels

PROJECT = Path(__file__).parent.parent
#: As root Chromium wants no sandbox; the rest keeps it from calling home.
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", type=Path, help="folder for the README's photographs")


@pytest.fixture
def screenshots(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where photographs of the page go."""
    return request.config.getoption("--screenshots") or tmp_path


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A real Chromium: the machine's own, else the one that Playwright installed."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CpuKernels:
    """The compiled CPU kernels; where there is a compiler, kernels that fail are a failure."""
    from qwen.cpu_kernels import load_kernels

    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler is installed")
    return load_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    """The embedded default's folder, fetched and converted on first use."""
    from qwen.backend import ignore_progress
    from qwen.checkpoint import resolve_checkpoint

    return resolve_checkpoint("auto", report=ignore_progress).folder


@pytest.fixture(scope="session")
def embedded_v1_folder(embedded_folder: Path) -> Path:
    """The embedded default in the layout of Qwen v1, 1.3 GB; converted once and kept."""
    from qwen.convert import CONVERTER_VERSION, convert_checkpoint
    from qwen.weights_cache import cache_folder, locked

    name = f"{embedded_folder.name}-qwen1-{CONVERTER_VERSION}"
    folder = cache_folder() / "converted" / name
    with locked(folder):
        if not folder.is_dir():
            # Nobody else writes it while the lock is held: a run was cut short.
            shutil.rmtree(folder.with_name(name + ".part"), ignore_errors=True)
            convert_checkpoint(embedded_folder, folder, to="qwen1")
    return folder


@pytest.fixture(scope="session")
def embedded_backend() -> Iterator[LocalBackend]:
    """The embedded default, loaded once for all integration tests."""
    backend = load_backend("auto", LoadOptions(device="cpu"))
    yield backend
    backend.close()


@pytest.fixture
def open_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def serve_page(open_port: int) -> Iterator[Callable[..., str]]:
    """Serve the page over a fake backend: `serve_page(backend, **settings) -> url`."""
    running = []

    def start(backend: FakeBackend | DeferredBackend, **settings: object) -> str:
        deferred = backend if isinstance(backend, DeferredBackend) else ready(backend)
        demo = launch_page(Settings(server_port=open_port, **settings), deferred)
        running.append((demo, deferred))
        return f"http://127.0.0.1:{open_port}/"

    yield start
    for demo, deferred in running:
        deferred.close()
        demo.close(verbose=False)


@pytest.fixture
def serve_api(open_port: int) -> Iterator[ServeApi]:
    """Serve the API alone over a fake backend: `serve_api(backend, **settings) -> ApiServer`."""
    running: list[ApiServer] = []

    def start(backend: FakeBackend | LocalBackend, **options: object) -> ApiServer:
        running.append(ApiServer(backend, open_port, api_settings(open_port, **options)))
        return running[-1]

    yield start
    for server in running:
        server.close()


class RunningApp:
    """`python app.py` in a process of its own, and what it has printed so far."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-u", "app.py", *arguments],
            cwd=PROJECT,
            env=os.environ | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until the process has printed a text."""
        wait_until(lambda: text in self.output or self.process.poll() is not None, seconds)
        assert text in self.output, self.output

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def run_app() -> Iterator[Callable[..., RunningApp]]:
    """Run `python app.py` with these arguments; ended after the test."""
    running: list[RunningApp] = []

    def start(*arguments: str, env: dict[str, str] | None = None) -> RunningApp:
        running.append(RunningApp(*arguments, env=env))
        return running[-1]

    yield start
    for app in running:
        app.end()
