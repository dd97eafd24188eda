"""Copies between device and host beside the engine. They run on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import structlog

from fastserve.worker.engine_thread import EngineThread
from fastserve.worker.job import OpStatus
from fastserve.worker.kv_ops import CopyDone
from fastserve.worker.metrics import Metrics
from fastserve.worker.staging import (
    BlockRef,
    Copied,
    HostCopyLost,
    KvStaging,
    NoHostSpace,
    NotSent,
    Place,
    SidecarLost,
)

log = structlog.get_logger(__name__)
_NOTHING = Copied(0, 0, 0.0)


class StagingMover:
    """Mover over KvStaging."""

    def __init__(
        self,
        thread: EngineThread,
        loop: asyncio.AbstractEventLoop,
        staging: KvStaging | None,
        metrics: Metrics,
    ) -> None:
        self._thread, self._loop = thread, loop
        self._tasks: set[asyncio.Task[None]] = set()
        self._exports: set[asyncio.Task[Copied]] = set()
        self._may_send = False
        self._metrics = metrics
        self.staging = staging

    async def settle(self) -> None:
        """Wait until no copy is under way here (the engine thread may then start others)."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def generation(self) -> int:
        return self.staging.generation if self.staging is not None else 0

    def store(self, job_id: str, blocks: Sequence[BlockRef], done: CopyDone) -> None:
        async def run(staging: KvStaging) -> Copied:
            return await staging.store(job_id, blocks)

        self._start("out", run, done)

    def load(self, job_id: str, blocks: Sequence[int], done: CopyDone) -> None:
        async def run(staging: KvStaging) -> Copied:
            return await staging.load(job_id, blocks)

        self._start("in", run, done)

    @property
    def caches(self) -> bool:
        return self.staging is not None

    @property
    def cached_blocks(self) -> int:
        return self.staging.cached_blocks if self.staging is not None else 0

    def save(
        self, blocks: Sequence[int], intact: Callable[[], Sequence[bytes]], done: CopyDone
    ) -> None:
        async def run(staging: KvStaging) -> Copied:
            return await staging.save(blocks, intact)

        self._start("out", run, done)

    def fetch(self, keys: Sequence[bytes], blocks: Sequence[int], done: CopyDone) -> None:
        async def run(staging: KvStaging) -> Copied:
            return await staging.fetch(keys, blocks)

        self._start("in", run, done)

    def release(self, job_id: str, done: CopyDone) -> None:
        async def run(staging: KvStaging) -> Copied:
            await staging.release([job_id])
            return _NOTHING

        self._start("", run, done)

    def export(self, job_id: str, blocks: Sequence[BlockRef], to: Place, done: CopyDone) -> None:
        self._begin(lambda: self._export(job_id, blocks, to), done)

    def allow_exports(self, allowed: bool) -> None:
        """Without a scheduler nothing is sent: nobody would hear that it arrived."""
        self._may_send = allowed
        if not allowed:
            for sending in self._exports:
                sending.cancel()

    async def _export(
        self, job_id: str, blocks: Sequence[BlockRef], to: Place
    ) -> tuple[OpStatus, Copied]:
        stored = _NOTHING
        if self.staging is None:
            return OpStatus.NOT_SENT, _NOTHING
        if blocks:
            status, stored = await self._outcome(
                "out", lambda staging: staging.store(job_id, blocks)
            )
            if status is not OpStatus.OK:
                return status, stored
        if not self._may_send:
            return OpStatus.NOT_SENT, replace(stored, bytes=0)
        sending = self._loop.create_task(self.staging.export(job_id, to))
        self._exports.add(sending)
        sending.add_done_callback(self._exports.discard)
        await asyncio.wait([sending])
        error = None if sending.cancelled() else sending.exception()
        if sending.cancelled() or isinstance(error, (NotSent, SidecarLost)):
            log.warning("KV was not sent", job_id=job_id, reason=str(error or "the scheduler left"))
            return OpStatus.NOT_SENT, replace(stored, bytes=0)
        sent = sending.result()
        return OpStatus.OK, Copied(stored.tokens, sent.bytes, stored.seconds + sent.seconds)

    def _start(
        self,
        direction: str,
        run: Callable[[KvStaging], Coroutine[Any, Any, Copied]],
        done: CopyDone,
    ) -> None:
        self._begin(lambda: self._outcome(direction, run), done)

    def _begin(
        self, outcome: Callable[[], Coroutine[Any, Any, tuple[OpStatus, Copied]]], done: CopyDone
    ) -> None:
        async def task() -> None:
            status, copied = await outcome()
            self._thread.soon(lambda _: done(status, copied))

        def begin() -> None:
            started = self._loop.create_task(task())
            self._tasks.add(started)
            started.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(begin)

    async def _outcome(
        self, direction: str, run: Callable[[KvStaging], Coroutine[Any, Any, Copied]]
    ) -> tuple[OpStatus, Copied]:
        refused = OpStatus.LOST if direction == "in" else OpStatus.NO_HOST_SPACE
        if self.staging is None:
            return (refused if direction else OpStatus.OK), _NOTHING
        try:
            copied = await run(self.staging)
        except NoHostSpace:
            return OpStatus.NO_HOST_SPACE, _NOTHING
        except (HostCopyLost, SidecarLost) as error:
            log.warning("KV copy failed", direction=direction or "release", reason=str(error))
            # A release that cannot be told: the sidecar that held the blocks is gone with them.
            return (refused if direction else OpStatus.OK), _NOTHING
        if copied.bytes:
            self._metrics.copied(direction, copied.bytes, copied.seconds)
        return OpStatus.OK, copied
