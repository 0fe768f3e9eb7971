"""An event loop on a thread of its own, used from plain synchronous code.

Why a loop: only there can a request be ended at any point, connecting and waiting included, and its
connection closed at once. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import CancelledError
from typing import Any, TypeVar

T = TypeVar("T")

#: How often a waiting reader looks whether it was cancelled.
_LOOK_SECONDS = 0.05


class LoopThread:
    """Runs coroutines for other threads. Every method may be called from any thread but its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="remote-engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and wait for its end.

        Raises:
            Exception: What the coroutine raised; CancelledError when the loop was closed.
        """
        if self._loop.is_closed() or not self._loop.is_running():
            work.close()
            raise CancelledError
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def iterate(self, source: AsyncGenerator[T, None], cancel: threading.Event) -> Iterator[T]:
        """Yield what an asynchronous generator yields, until it ends or `cancel` is set.

        Whatever ends this iterator, closing it included, ends the generator at the point where it
        is.

        Raises:
            Exception: What the generator raised; CancelledError when the loop was closed.
        """
        items: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async for item in source:
                    items.put(("item", item))
                items.put(("end", None))
            except asyncio.CancelledError:
                items.put(("error", CancelledError()))
                raise
            except Exception as error:
                items.put(("error", error))
            finally:
                await source.aclose()

        if self._loop.is_closed():
            raise CancelledError
        running = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while not cancel.is_set():
                try:
                    kind, value = items.get(timeout=_LOOK_SECONDS)
                except queue.Empty:
                    continue
                if kind == "end":
                    return
                if kind == "error":
                    raise value
                yield value
        finally:
            running.cancel()

    def close(self, last: Coroutine[Any, Any, None], *, seconds: float = 2.0) -> None:
        """Cancel everything, run a last coroutine and end the thread; harmless when repeated."""
        if not self._thread.is_alive() or self._loop.is_closed():
            last.close()
            return

        async def shut() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await last
            await self._loop.shutdown_asyncgens()

        try:
            asyncio.run_coroutine_threadsafe(shut(), self._loop).result(seconds)
        except (TimeoutError, CancelledError):
            pass
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(seconds)
