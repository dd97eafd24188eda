"""Write-behind of the job table to Redis, and the moment from which tokens may be seen.

Changes are not queued: jobs are marked, and what to write is read from memory when the next write
goes out. One write is under way at most, so whatever happens during a slow one leaves together in
the next. What a write confirmed is released to the gateways.

When Redis fails, or takes longer than the time-out of the store, durability is declared lost:
everything is released from memory at once. The backlog is then the job table itself, nothing
beside it: live jobs, which the queue limit bounds, and ended ones for their grace. When Redis is
back all of it is written whole, then tokens wait for their write again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from fastserve.scheduler.clock import Clock
from fastserve.scheduler.core import FinishReason
from fastserve.scheduler.jobs import JobRecord, JobTable
from fastserve.scheduler.lease import Term
from fastserve.scheduler.store import Store
from fastserve.scheduler.store_errors import ADVICE, FencedError, StoreError
from fastserve.scheduler.stored import Batch, Placement, StoredJob

log = structlog.get_logger(__name__)

_RETRY_S: Final = (0.1, 1.0)  # first and longest pause
# Tokens of whole jobs in one write: a script call of about 10 ms.
_WHOLE_TOKENS: Final = 100_000

_END_STATES = {
    FinishReason.STOP: "finished",
    FinishReason.LENGTH: "finished",
    FinishReason.CANCELLED: "cancelled",
    FinishReason.DEADLINE: "failed",
    FinishReason.FAILED: "failed",
}


@dataclass(frozen=True, slots=True)
class _Taken:
    batch: Batch
    reached: list[tuple[JobRecord, int, bool]]  # record, tokens, whether its end is in the batch


class Journal:
    """Keeps Redis up with the job table. All methods but `run` are synchronous and cheap."""

    def __init__(
        self,
        store: Store,
        term: Term,
        jobs: JobTable,
        clock: Clock,
        *,
        keep_s: int,
        changed: Callable[[bool], None],
        observe: Callable[[float], None],
    ) -> None:
        """`changed` gets every change of `durable`, `observe` the seconds each write took. Ended
        jobs stay in Redis for `keep_s` seconds."""
        self._store = store
        self._term = term
        self._jobs = jobs
        self._clock = clock
        self._keep_s = keep_s
        self._changed = changed
        self._observe = observe
        self.durable = True
        self._holding = True  # tokens wait for their write
        self._away = False  # nothing is marked: a snapshot will hold everything
        self._suspect: StoreError | None = None  # why what Redis confirmed may be gone
        self._dirty: dict[JobRecord, bool] = {}  # value: whether its placement changed
        self._unreleased: dict[JobRecord, None] = {}  # changed since the last commit
        self._forgotten: list[str] = []
        self._workers: dict[str, str] = {}  # what is known of each, for people
        self._new_workers: set[str] = set()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._seq = 0
        self.confirmed_seq = 0  # the last write that Redis confirmed
        self.losses = 0

    @property
    def backlog(self) -> int:
        """Jobs whose last changes are not in Redis."""
        return len(self._dirty) if self.durable else len(self._jobs)

    def mark(self, record: JobRecord, *, placed: bool = False) -> None:
        """`record` is new, has more output, ended, or (`placed`) stands elsewhere."""
        if not self._away:
            self._dirty[record] = placed or self._dirty.get(record, False)
        self._unreleased[record] = None

    def note_worker(self, worker_id: str, facts: Mapping[str, str | float]) -> None:
        """Leave a note about a worker with the next write, for people who look into Redis."""
        self._workers[worker_id] = json.dumps(facts)
        self._new_workers.add(worker_id)

    def commit(self) -> None:
        """The marks so far belong together: write them, or release them if nothing is durable."""
        if not self._holding:
            self._show(self._unreleased)
        self._unreleased.clear()
        if self._dirty or self._new_workers:
            self._idle.clear()
            self._wake.set()

    def lose(self, why: StoreError, losses: int) -> None:
        """What Redis confirmed may be gone: declare it and write everything anew.

        `losses` is what it was when the caller began to look: old news is dropped.
        """
        if losses == self.losses:
            self._suspect = why
            self._wake.set()

    async def flush(self) -> None:
        """Wait until everything committed is written. Endless while Redis is away."""
        await self._idle.wait()

    async def run(self) -> None:
        """Write until cancelled. Raises `FencedError` when another leader took over."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                if self._suspect is not None:
                    raise self._suspect
                while self._dirty or self._new_workers:
                    await self._put(self._take(), resync=False)
                self._idle.set()
            except FencedError:
                raise
            except StoreError as error:
                await self._recover(error)

    async def _recover(self, why: StoreError) -> None:
        """Serve from memory until all of it is in Redis again."""
        _complain(why)
        self.durable = False
        self.losses += 1
        self._idle.clear()
        self._changed(False)
        lost_at = self._clock.now()
        pause = _RETRY_S[0]
        while True:
            self._suspect = None
            self._holding = False
            self._show(self._jobs)
            self._away = True
            self._dirty.clear()
            try:
                await self._write_everything()
                break
            except FencedError:
                raise
            except StoreError as error:
                if error.trouble is not why.trouble:
                    _complain(error)
                why = error
                await asyncio.sleep(pause)
                pause = min(2 * pause, _RETRY_S[1])
        self.durable = True
        self._changed(True)
        self._wake.set()
        log.info(
            "redis is back: all jobs written, answers are durable",
            jobs=len(self._jobs),
            lost_s=round(self._clock.now() - lost_at, 3),
        )

    async def _write_everything(self) -> None:
        term = self._term
        await self._store.renew(term.epoch, term.owner, term.ttl_s)
        held = await self._store.job_ids()
        self._forgotten = [job_id for job_id in held if job_id not in self._jobs]
        self._new_workers.update(self._workers)
        self._away = False
        self._dirty = dict.fromkeys(self._jobs, True)
        for record in self._jobs:
            record.written = -1
        resync = True
        while not self._holding:
            taken = self._take()
            # What comes from now on waits for its write again: this one is the last of the backlog.
            self._holding = not self._dirty
            await self._put(taken, resync=resync)
            resync = False

    def _take(self) -> _Taken:
        """What to write next: everything that changed, but only so many whole jobs at once."""
        batch = Batch(
            forgotten=self._forgotten,
            workers={worker_id: self._workers[worker_id] for worker_id in self._new_workers},
        )
        self._forgotten = []
        self._new_workers.clear()
        reached = []
        size = 0
        while self._dirty and size < _WHOLE_TOKENS:
            record = next(iter(self._dirty))
            placed = self._dirty.pop(record)
            count = len(record.output)
            if record.written < 0:
                batch.whole.append(stored(record))
                size += len(record.spec.prompt) + count
            else:
                if count > record.written:
                    batch.appended.append((record.job_id, record.output[record.written :]))
                if placed and record.end is None:
                    batch.placed.append(_placement(record))
            if record.end is not None:
                state = _END_STATES[record.end.reason]
                batch.ended.append((record.job_id, state, record.end.reason, record.end.error))
            record.written = count
            reached.append((record, count, record.end is not None))
        return _Taken(batch, reached)

    async def _put(self, taken: _Taken, *, resync: bool) -> None:
        self._seq += 1
        started = self._clock.now()
        await self._store.write(
            self._term.epoch,
            self._seq,
            taken.batch,
            self._clock.unix(),
            self._keep_s,
            resync=resync,
        )
        self._observe(self._clock.now() - started)
        self.confirmed_seq = self._seq
        for record, count, ended in taken.reached:
            record.visible = max(record.visible, count)
            record.end_visible = record.end_visible or ended
            _tell(record)

    def _show(self, records: Iterable[JobRecord]) -> None:
        """Release from memory what is not written."""
        for record in records:
            ended = record.end is not None
            if record.visible < len(record.output) or record.end_visible != ended:
                record.visible, record.end_visible = len(record.output), ended
                _tell(record)


def _complain(why: StoreError) -> None:
    log.error(
        "redis failed: serving from memory, answers are not durable",
        kind=why.trouble,
        reason=str(why),
        advice=ADVICE[why.trouble],
    )


def _tell(record: JobRecord) -> None:
    if record.recipient is not None:
        record.recipient.wake(record)


def _placement(record: JobRecord) -> Placement:
    job = record.job
    if job is None:
        return Placement(record.job_id, 0, 0, 0.0, 0, "")
    return Placement(record.job_id, job.level, job.place, job.attained, job.preemptions, job.state)


def stored(record: JobRecord) -> StoredJob:
    """The whole of a job, as Redis keeps it."""
    at, end = _placement(record), record.end
    return StoredJob(
        job_id=record.job_id,
        tenant=record.spec.tenant,
        tenant_weight=record.spec.tenant_weight,
        service_class=record.spec.service_class,
        priority=record.spec.priority,
        arrival_unix_s=record.arrival_unix_s,
        deadline_unix_s=record.deadline_unix_s,
        min_output_tokens=record.spec.min_tokens,
        traceparent=record.traceparent,
        prompt=record.spec.prompt,
        sampling=record.sampling,
        level=at.level,
        order=at.order,
        attained_s=at.attained_s,
        preemptions=at.preemptions,
        state=at.state if end is None else _END_STATES[end.reason],
        output=record.output,
        finish_reason="" if end is None else end.reason,
        error="" if end is None else end.error,
    )
