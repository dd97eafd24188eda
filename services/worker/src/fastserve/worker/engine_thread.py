"""The thread that runs iterations, and how the event loop talks to it.

The event loop owns gRPC and the copies, the engine thread owns the engine. They meet in one inbox
of callables that the engine thread runs between iterations, so a newer plan takes effect at the
next boundary. With nothing to run the thread blocks on the inbox.

What does not concern the rows need not wait for a boundary, since jobs wait for it: while the model
computes the thread leaves the engine alone, and the event loop may act on it (`soon`, `at_once`).

Reports go the other way. A loop that is woken while the engine thread holds the interpreter lock
can do no more than wait for it, and then has to be woken again. So a report waits until the thread
blocks or the next iteration computes, where the kernels wake the loop (`bell`): they begin without
the lock.

The first token of a job that is alone has four processes to pass, and kernels on all cores make it
wait for a core in each of them. So it gets a head start before the next iteration; where other jobs
would have to wait as well it gets none.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, TypeVar

import structlog

from fastserve.worker.engine import Engine, Iteration

log = structlog.get_logger(__name__)
Report = Callable[[Iteration], None]
T = TypeVar("T")

_HEAD_START_S: Final = 0.0015  # a token is in Redis by then, if the cores are idle


class _Computing:
    """While the model computes: the engine thread does without the lock."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.release()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.acquire()


class EngineThread:
    """Runs an engine between the messages of its inbox."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._report: Report = lambda _: None
        self._engine: Engine | None = None
        # Of the engine. The thread has it but for `_Computing`, so whoever else gets it is alone.
        self._lock = threading.Lock()
        self._lock.acquire()
        self._reports: deque[Iteration] = deque()  # that the loop has not seen yet
        self._bell: int | None = None
        self._inbox: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.failure: asyncio.Future[None] = loop.create_future()  # the bug that ended the thread

    def start(self, engine: Engine, report: Report) -> None:
        """Start running; the engine belongs to the thread from now on. `report` is called on the
        event loop for whatever there is to report."""
        self._engine, self._report = engine, report
        self._thread = threading.Thread(target=self._guarded, args=(engine,), name="engine")
        self._thread.start()

    def bell(self) -> int:
        """An eventfd for a model that writes to it when it begins to compute an iteration.

        Call it before `start`, and only for such a model. `stop` closes it.
        """
        self._bell = bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

        def rung() -> None:
            os.eventfd_read(bell)
            self._deliver()

        self._loop.add_reader(bell, rung)
        return bell

    def post(self, action: Callable[[Engine], None]) -> None:
        """Run `action(engine)` on the engine thread at the next iteration boundary."""
        self._inbox.put(action)

    def at_once(self, action: Callable[[Engine], T]) -> T | None:
        """Run `action(engine)` now, if the model computes: it must not touch what has a row. None:
        it does not. What ends by that is told at once. Called on the event loop.
        """
        if self._engine is None or not self._lock.acquire(blocking=False):
            return None
        try:
            done = action(self._engine)
            ended = self._engine.ended_report()
        except Exception as bug:
            self._failed(bug)
            raise
        finally:
            self._lock.release()
        if ended is not None:
            self._deliver()  # those before it come first
            self._report(ended)
        return done

    def soon(self, action: Callable[[Engine], None]) -> None:
        """`at_once` if that is possible, else like `post`."""

        def run(engine: Engine) -> bool:
            action(engine)
            return True

        if not self.at_once(run):
            self.post(action)

    async def ask(self, question: Callable[[Engine], Any]) -> Any:
        """Like `post`, and wait for the result."""
        answer: asyncio.Future[Any] = self._loop.create_future()

        def run(engine: Engine) -> None:
            told = question(engine)
            self._wake()  # what was before the question is heard before the answer
            self._loop.call_soon_threadsafe(_resolve, answer, told)

        self.post(run)
        return await answer

    async def stop(self) -> None:
        """End after the iteration under way."""
        self._inbox.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._deliver()
        if self._bell is not None:
            self._loop.remove_reader(self._bell)
            os.close(self._bell)
            self._bell = None

    def _guarded(self, engine: Engine) -> None:
        try:
            self._run(engine)
        except Exception as bug:
            log.exception("the engine thread failed")
            self._wake()
            self._loop.call_soon_threadsafe(self._failed, bug)

    def _failed(self, bug: Exception) -> None:
        if not self.failure.done():
            self.failure.set_exception(bug)

    def _run(self, engine: Engine) -> None:
        computing = _Computing(self._lock)
        left_at: float | None = None  # the last iteration ended and left rows
        acted = False  # since the last iteration, so there may be more to report
        while True:
            # An exception instead would cost 12 us: everything is cold after a step.
            if engine.runnable and self._inbox.empty():
                # Not with the iteration that begins: the next plan, which counts on it, would come
                # that much later.
                if acted:
                    self._emit_ended(engine)
                    acted = False
                if self._bell is None:  # else the iteration does it
                    self._wake()
                began = time.perf_counter()
                iteration = engine.step(computing)
                if left_at is not None:
                    iteration.control_seconds = began - left_at
                left_at = time.perf_counter() if engine.has_rows else None
                self._reports.append(iteration)
                if self._bell is not None and iteration.begins_alone:
                    self._head_start(engine)
                continue
            if self._inbox.empty():  # it may be long until the next iteration
                self._wake()
            action = self._inbox.get()
            if action is None:
                return
            action(engine)
            acted = True
            if not engine.has_rows:
                left_at = None  # nothing to do is no overhead
            if not engine.runnable:
                self._emit_ended(engine)

    def _head_start(self, engine: Engine) -> None:
        """Leave the cores to the first token of a job, if it is still alone."""
        if engine.runnable and self._inbox.empty():
            self._wake()
            time.sleep(_HEAD_START_S)

    def _emit_ended(self, engine: Engine) -> None:
        ended = engine.ended_report()
        if ended is not None:
            self._reports.append(ended)

    def _wake(self) -> None:
        if self._reports:
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        """Called on the event loop."""
        while self._reports:
            self._report(self._reports.popleft())


def _resolve(answer: asyncio.Future[Any], value: Any) -> None:
    if not answer.done():  # the one who asked may have been cancelled
        answer.set_result(value)
