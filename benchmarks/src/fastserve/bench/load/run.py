"""Runs: requests on schedule, or so many at a time.

Open loop: every request leaves when it is due, whatever became of those before it, and its latency
counts from then. So a server that stalls is charged for everyone who would have waited meanwhile
(no coordinated omission). Closed loop: a fixed number of clients, each with one request at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from fastserve.bench.load.target import Target
from fastserve.bench.load.types import ClientHealth, LoadRequest, Outcome, RunResult

Progress = Callable[[int], None]  # how many requests have ended

_HEAD_START_S: Final = 0.05  # between the start of a run and its first request
_STALL_PERIOD_S: Final = 0.01


class Runner:
    """One run against one target. `stop` ends it early: what has ended is reported."""

    def __init__(
        self, target: Target, stop: asyncio.Event, progress: Progress = lambda _: None
    ) -> None:
        self._target = target
        self._stop = stop
        self._progress = progress
        self._outcomes: list[Outcome] = []
        self._started = 0
        self._stalls: list[float] = []
        self._start = 0.0

    async def open_loop(self, requests: Sequence[LoadRequest]) -> RunResult:
        """`requests` by `due_s`."""
        with self._watched() as cpu:
            self._start = time.perf_counter() + _HEAD_START_S
            tasks: list[asyncio.Task[None]] = []
            for request in requests:
                if not await self._wait_until(self._start + request.due_s):
                    break
                tasks.append(asyncio.ensure_future(self._one(request, request.due_s)))
            await self._finish(tasks)
        return self._result(requests, cpu())

    async def closed_loop(self, requests: Sequence[LoadRequest], concurrency: int) -> RunResult:
        """In the order given."""
        with self._watched() as cpu:
            self._start = time.perf_counter()
            waiting = iter(requests)

            async def client() -> None:
                for request in waiting:
                    await self._one(request, time.perf_counter() - self._start)
                    if self._stop.is_set():
                        return

            await self._finish([asyncio.ensure_future(client()) for _ in range(concurrency)])
        return self._result(requests, cpu())

    async def _one(self, request: LoadRequest, due: float) -> None:
        self._started += 1
        self._outcomes.append(await self._target.run(request, due, self._start))
        self._progress(len(self._outcomes))

    async def _wait_until(self, moment: float) -> bool:
        """False if the run was stopped before."""
        while (pause := moment - time.perf_counter()) > 0 and not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stop.wait()
        return not self._stop.is_set()

    async def _finish(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Until all have ended, or the run is stopped."""
        all_done = asyncio.gather(
            *tasks
        )  # ends with the first bug: it must not look like a failure
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            ends: set[asyncio.Future[Any]] = {all_done, stopping}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if all_done.done():
                all_done.result()
        finally:
            for future in (all_done, stopping):
                future.cancel()
            await asyncio.gather(*tasks, all_done, stopping, return_exceptions=True)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[Callable[[], float]]:
        """Watch the event loop of this process; yields what tells its CPU use at the end."""
        clock, cpu = time.perf_counter(), time.process_time()

        async def watch() -> None:
            while True:
                due = time.perf_counter() + _STALL_PERIOD_S
                await asyncio.sleep(_STALL_PERIOD_S)
                self._stalls.append(max(0.0, time.perf_counter() - due))

        watching = asyncio.ensure_future(watch())
        try:
            yield lambda: (time.process_time() - cpu) / (time.perf_counter() - clock)
        finally:
            watching.cancel()

    def _result(self, requests: Sequence[LoadRequest], cpu: float) -> RunResult:
        late = [outcome.sent - outcome.due for outcome in self._outcomes] or [0.0]
        p50, p99 = np.percentile(late, (50, 99)).tolist()
        stall = float(np.percentile(self._stalls or [0.0], 99))
        return RunResult(
            outcomes=self._outcomes,
            unfinished=self._started - len(self._outcomes),
            not_sent=len(requests) - self._started,
            client=ClientHealth(p50, p99, max(late), stall, cpu),
        )
