import logging
import threading
import weakref

import pytest

from qwen.backend import BackendInfo, DeferredBackend
from qwen.errors import BackendFailed, BackendNotReady, CheckpointNotFound, OutOfMemory
from qwen.messages import ChatRequest, ContextUsage, Message, StreamEvent

REQUEST = ChatRequest(messages=(Message("user", "hi"),))


class EchoBackend:
    def __init__(self):
        self.info = BackendInfo(name="Echo", context_length=10)
        self.closed = threading.Event()

    def stream(self, request, cancel):
        yield StreamEvent(text=request.messages[-1].content)

    def count_tokens(self, request):
        return ContextUsage(system=0, history=0, query=1, limit=10)

    def close(self):
        self.closed.set()


class Loader:
    """A `load` that waits until it is let go, and fails as often as it is told to."""

    def __init__(self, *failures):
        self.failures = list(failures)
        self.go, self.entered = threading.Event(), threading.Event()
        self.made = []

    def __call__(self, report):
        report("Downloading", done=1, total=4, unit="bytes")
        self.entered.set()
        assert self.go.wait(10)
        if self.failures:
            raise self.failures.pop(0)
        self.made.append(EchoBackend())
        return self.made[-1]


class Statuses:
    """Keeps every status and lets a test wait for a stage."""

    def __init__(self):
        self.all, self.changed = [], threading.Condition()

    def __call__(self, status):
        with self.changed:
            self.all.append(status)
            self.changed.notify_all()

    def wait_for(self, stage, count=1):
        with self.changed:
            assert self.changed.wait_for(
                lambda: sum(status.stage == stage for status in self.all) >= count, 10
            )


def deferred(load):
    statuses = Statuses()
    return DeferredBackend(load, on_status=statuses), statuses


def test_requests_are_refused_while_loading_and_served_afterwards():
    load = Loader()
    backend, statuses = deferred(load)
    backend.start()
    assert load.entered.wait(10)
    for ask in (
        lambda: backend.info,
        lambda: backend.count_tokens(REQUEST),
        lambda: backend.stream(REQUEST, threading.Event()),
    ):
        with pytest.raises(BackendNotReady, match="still being loaded"):
            ask()
    load.go.set()
    statuses.wait_for("ready")
    assert backend.info.name == "Echo" and backend.count_tokens(REQUEST).query == 1
    assert [event.text for event in backend.stream(REQUEST, threading.Event())] == ["hi"]


def test_progress_is_shown_while_loading():
    load = Loader()
    backend, statuses = deferred(load)
    backend.start()
    assert load.entered.wait(10)
    status = backend.status
    assert (status.stage, status.step, status.done, status.total) == (
        "loading",
        "Downloading",
        1,
        4,
    )
    assert status.seconds >= 0
    load.go.set()
    statuses.wait_for("ready")
    assert backend.status.seconds == backend.status.seconds


def test_backend_is_there_when_ready_is_announced():
    load, seen = Loader(), []
    backend = DeferredBackend(
        load,
        on_status=lambda status: seen.append(backend.info) if status.stage == "ready" else None,
    )
    backend.start()
    load.go.set()
    for thread in threading.enumerate():
        if thread.name == "load-model":
            thread.join(10)
    assert [info.name for info in seen] == ["Echo"]


def test_known_failure_is_told_and_loading_may_begin_again():
    load = Loader(CheckpointNotFound("No such model. Check the name."))
    load.go.set()
    backend, statuses = deferred(load)
    backend.start()
    statuses.wait_for("failed")
    assert isinstance(backend.status.error, CheckpointNotFound)
    with pytest.raises(CheckpointNotFound, match="No such model"):
        backend.info  # noqa: B018
    backend.start()
    statuses.wait_for("ready")
    assert backend.info.name == "Echo"


def test_unexpected_failure_is_logged_and_told_without_its_details(caplog):
    load = Loader(RuntimeError("secret detail"))
    load.go.set()
    backend, statuses = deferred(load)
    with caplog.at_level(logging.ERROR):
        backend.start()
        statuses.wait_for("failed")
    assert "secret detail" in caplog.text
    with pytest.raises(BackendFailed) as caught:
        backend.stream(REQUEST, threading.Event())
    assert "secret detail" not in str(caught.value)


def test_error_is_not_chained_from_one_request_to_the_next():
    load = Loader(CheckpointNotFound("No such model."))
    load.go.set()
    backend, statuses = deferred(load)
    backend.start()
    statuses.wait_for("failed")
    depths = []
    for _ in range(3):
        with pytest.raises(CheckpointNotFound) as caught:
            backend.count_tokens(REQUEST)
        depths.append(len(caught.traceback))
    assert depths[0] == depths[1] == depths[2]


def test_failure_that_is_kept_holds_nothing_of_what_was_half_loaded():
    class Weights:
        pass

    held = []

    def load(report):
        weights = Weights()
        held.append(weakref.ref(weights))
        raise OutOfMemory("It does not fit.")

    backend, statuses = deferred(load)
    backend.start()
    statuses.wait_for("failed")
    for thread in threading.enumerate():
        if thread.name == "load-model":
            thread.join(10)
    assert isinstance(backend.status.error, OutOfMemory)
    assert held[0]() is None


def test_starting_twice_loads_once():
    load = Loader()
    backend, statuses = deferred(load)
    backend.start()
    backend.start()
    load.go.set()
    statuses.wait_for("ready")
    backend.start()
    assert len(load.made) == 1


def test_not_started_backend_is_not_ready():
    with pytest.raises(BackendNotReady):
        deferred(Loader())[0].count_tokens(REQUEST)


def test_closing_closes_the_real_backend():
    load = Loader()
    load.go.set()
    backend, statuses = deferred(load)
    backend.start()
    statuses.wait_for("ready")
    backend.close()
    assert load.made[0].closed.is_set()


def test_closing_while_loading_closes_what_comes_of_it():
    load = Loader()
    backend, _ = deferred(load)
    backend.start()
    assert load.entered.wait(10)
    backend.close()
    load.go.set()
    deadline = threading.Event()
    for _ in range(1000):
        if load.made and load.made[0].closed.wait(0.01):
            break
        deadline.wait(0.01)
    assert load.made[0].closed.is_set()


def test_closed_backend_is_not_started_again():
    load = Loader()
    backend, _ = deferred(load)
    backend.close()
    backend.start()
    assert not load.entered.wait(0.1)


def test_closing_twice_is_harmless_and_stays_closed():
    load = Loader()
    backend, _ = deferred(load)
    backend.close()
    backend.close()
    backend.start()
    assert not load.entered.wait(0.1)


def test_fault_in_a_progress_bar_does_not_stop_the_loading():
    load = Loader()
    load.go.set()

    def broken(status):
        raise OSError("the terminal is gone")

    backend = DeferredBackend(load, on_status=broken)
    backend.start()
    for thread in threading.enumerate():
        if thread.name == "load-model":
            thread.join(10)
    assert backend.info.name == "Echo"
