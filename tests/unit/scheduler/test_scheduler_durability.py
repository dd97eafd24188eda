"""The journal between the job table and Redis, against a real Valkey that fails in many ways."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest
from redis.asyncio import Redis

from fastserve.proto.v1.sampling_pb2 import SamplingParams
from fastserve.scheduler import lease
from fastserve.scheduler.clock import Clock
from fastserve.scheduler.core import FinishReason, Job, JobSpec
from fastserve.scheduler.durability import Journal, stored
from fastserve.scheduler.jobs import End, JobRecord, JobTable
from fastserve.scheduler.lease import Term
from fastserve.scheduler.store import Store
from fastserve.scheduler.store_errors import FencedError
from support.valkey import Valkey, running_valkey
from support.waiting import eventually

TIMEOUT_S = 0.5  # where Redis is frozen until it passes


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    """A server of its own: these tests freeze and kill it."""
    with running_valkey() as server:
        yield server


class Bench:
    """A journal with its job table, and a second client that looks at Redis."""

    def __init__(self, valkey: Valkey, term: Term, store: Store) -> None:
        self.valkey = valkey
        self.term = term
        self.store = store
        self.jobs = JobTable(grace_s=30)
        self.changes: list[bool] = []
        self.writes = 0
        self.woken: list[str] = []
        self.journal = Journal(
            store,
            term,
            self.jobs,
            Clock(),
            keep_s=30,
            changed=self.changes.append,
            observe=self._count,
        )

    def _count(self, _: float) -> None:
        self.writes += 1

    def wake(self, record: JobRecord) -> None:
        self.woken.append(record.job_id)

    def drop(self, record: JobRecord) -> None:
        raise AssertionError("nobody takes jobs here")

    def submit(self, job_id: str) -> JobRecord:
        spec = JobSpec(job_id, prompt=(1, 2, 3), max_tokens=1000, arrival=0.0)
        job = Job(spec, seq=len(self.jobs), now=0.0)
        record = JobRecord(
            spec=spec,
            output=job.output,
            job=job,
            sampling=SamplingParams(max_tokens=1000, seed=7),
            traceparent="",
            arrival_unix_s=1.5,
            deadline_unix_s=0.0,
        )
        record.attach(self, 1, 0)
        self.jobs.add(record)
        self.journal.mark(record)
        self.journal.commit()
        return record

    def iterate(self, *records: JobRecord) -> None:
        """Every job gets a token."""
        for record in records:
            assert record.job is not None
            record.job.output.append(100 + len(record.output))
            self.journal.mark(record)
        self.journal.commit()

    async def check_redis(self) -> None:
        """Redis holds exactly what memory holds."""
        held = {job.job_id: job for job in await self.store.load()}
        wanted = {
            record.job_id: dataclasses.replace(stored(record), prompt=list(record.spec.prompt))
            for record in self.jobs
        }
        assert held == wanted


@pytest.fixture
def timeout_s() -> float:
    """Of Redis, so long that a busy machine is not taken for a Redis that is gone."""
    return 10.0


@pytest.fixture
async def bench(valkey: Valkey, timeout_s: float) -> AsyncIterator[Bench]:
    store = Store(valkey.url, "s", timeout_s)
    term = await lease.win(store, "me", 60.0, lambda: None)
    bench = Bench(valkey, term, store)
    running = asyncio.ensure_future(bench.journal.run())
    yield bench
    running.cancel()
    with suppress(asyncio.CancelledError, FencedError):
        await running
    await store.close()


async def test_nothing_is_visible_before_it_is_written(bench: Bench) -> None:
    record = bench.submit("a")
    await bench.journal.flush()
    assert (record.visible, bench.woken) == (0, ["a"])
    bench.valkey.pause()
    bench.iterate(record)
    await asyncio.sleep(0.2)
    assert (record.visible, bench.woken) == (0, ["a"])
    bench.valkey.resume()
    await bench.journal.flush()
    assert (record.visible, bench.woken) == (1, ["a", "a"])
    assert bench.changes == []
    await bench.check_redis()


async def test_what_happens_during_a_slow_write_goes_out_in_the_next(bench: Bench) -> None:
    records = [bench.submit(f"j{number}") for number in range(3)]
    await bench.journal.flush()
    before = bench.writes
    bench.valkey.pause()
    bench.iterate(*records)
    await asyncio.sleep(0)  # the write is under way
    await asyncio.sleep(0)
    for _ in range(20):
        bench.iterate(*records)
    bench.valkey.resume()
    await bench.journal.flush()
    assert bench.writes == before + 2
    assert [record.visible for record in records] == [21, 21, 21]
    await bench.check_redis()


async def test_an_end_is_visible_when_it_is_written(bench: Bench) -> None:
    record = bench.submit("a")
    bench.iterate(record)
    record.end = End(FinishReason.STOP, "")
    bench.journal.mark(record)
    assert not record.end_visible
    bench.journal.commit()
    await bench.journal.flush()
    assert record.end_visible
    await bench.check_redis()


@pytest.mark.parametrize("timeout_s", [TIMEOUT_S])
async def test_a_frozen_redis_holds_tokens_for_a_bounded_time(bench: Bench) -> None:
    record = bench.submit("a")
    await bench.journal.flush()
    bench.valkey.pause()
    bench.iterate(record)
    await eventually(lambda: record.visible == 1)
    assert not bench.journal.durable
    # From now on nothing waits.
    bench.iterate(record)
    assert record.visible == 2
    bench.valkey.resume()
    await eventually(lambda: bench.journal.durable)
    assert bench.changes == [False, True]
    await bench.journal.flush()
    await bench.check_redis()


async def test_a_redis_that_died_gets_everything_anew(bench: Bench) -> None:
    old = bench.submit("old")
    ended = bench.submit("ended")
    bench.iterate(old, ended)
    ended.end = End(FinishReason.FAILED, "it broke")
    bench.journal.mark(ended)
    bench.journal.commit()
    await bench.journal.flush()
    bench.valkey.stop()
    bench.iterate(old)
    await eventually(lambda: bench.changes == [False])
    late = bench.submit("late")
    bench.iterate(old, late)
    assert (old.visible, late.visible) == (3, 1)
    bench.valkey.start()
    await eventually(lambda: bench.changes == [False, True])
    bench.iterate(old, late)
    assert (old.visible, late.visible) == (3, 1)  # tokens wait for their write again
    await bench.journal.flush()
    assert (old.visible, late.visible) == (4, 2)
    await bench.check_redis()


@pytest.mark.parametrize("timeout_s", [TIMEOUT_S])
async def test_jobs_that_went_while_redis_was_away_go_there_too(bench: Bench) -> None:
    gone, stays = bench.submit("gone"), bench.submit("stays")
    bench.iterate(gone, stays)
    await bench.journal.flush()
    bench.valkey.pause()
    bench.iterate(stays)
    await eventually(lambda: not bench.journal.durable)
    gone.end = End(FinishReason.CANCELLED, "")
    bench.jobs.retire(gone, now=0.0)
    bench.jobs.forget_ended(now=1000.0)
    bench.valkey.resume()
    await eventually(lambda: bench.journal.durable)
    assert await bench.store.job_ids() == ["stays"]
    await bench.check_redis()


async def test_an_outage_costs_no_memory_beyond_the_jobs(bench: Bench) -> None:
    records = [bench.submit(f"j{number}") for number in range(5)]
    await bench.journal.flush()
    bench.valkey.stop()
    bench.iterate(*records)
    await eventually(lambda: not bench.journal.durable)
    for _ in range(500):
        bench.iterate(*records)
    assert len(bench.journal._dirty) <= len(records)
    bench.valkey.start()
    await eventually(lambda: bench.journal.durable)
    await bench.check_redis()


async def test_jobs_that_come_and_go_in_an_outage_leave_nothing(bench: Bench) -> None:
    stays = bench.submit("stays")
    await bench.journal.flush()
    bench.valkey.stop()
    bench.iterate(stays)
    await eventually(lambda: not bench.journal.durable)
    for number in range(200):
        record = bench.submit(f"j{number}")
        bench.iterate(stays, record)
        record.end = End(FinishReason.STOP, "")
        bench.journal.mark(record)
        bench.journal.commit()
        bench.jobs.retire(record, now=0.0)
        bench.jobs.forget_ended(now=1000.0)
        await asyncio.sleep(0.002)  # tries to reach Redis happen in between
    assert bench.journal.backlog == 1
    assert len(bench.journal._dirty) <= 1
    bench.valkey.start()
    await eventually(lambda: bench.journal.durable)
    await bench.journal.flush()
    await bench.check_redis()


async def test_a_long_history_is_written_in_pieces(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastserve.scheduler.durability._WHOLE_TOKENS", 10)
    records = [bench.submit(f"j{number}") for number in range(20)]
    await bench.journal.flush()
    bench.valkey.stop()
    bench.iterate(*records)
    await eventually(lambda: not bench.journal.durable)
    before = bench.writes
    bench.valkey.start()
    await eventually(lambda: bench.journal.durable)
    assert bench.writes >= before + 7
    await bench.check_redis()


async def test_an_idle_leader_notices_that_redis_lost_its_data(bench: Bench) -> None:
    term = Term(bench.term.epoch, "me", ttl_s=0.2)
    keeping = asyncio.ensure_future(lease.keep(bench.store, term, bench.journal))
    record = bench.submit("a")
    await bench.journal.flush()
    bench.valkey.stop()
    bench.valkey.start()
    await eventually(lambda: bench.changes == [False, True])
    await bench.check_redis()
    assert record.visible == 0
    keeping.cancel()


async def test_a_standby_lets_the_leader_repair_what_redis_lost(bench: Bench) -> None:
    ttl_s = 2.0
    standing_by = Store(bench.valkey.url, "s", timeout_s=10.0)
    winning = asyncio.ensure_future(lease.win(standing_by, "you", ttl_s, lambda: None))
    keeping = asyncio.ensure_future(
        lease.keep(bench.store, Term(bench.term.epoch, "me", ttl_s), bench.journal)
    )
    bench.submit("a")
    await bench.journal.flush()
    async with Redis.from_url(bench.valkey.url) as redis:
        for _ in range(3):
            losses = bench.journal.losses
            await redis.flushall()
            await eventually(lambda: bench.journal.losses > losses and bench.journal.durable)  # noqa: B023
            assert not winning.done() and not keeping.done()
    await bench.check_redis()
    keeping.cancel()
    await bench.store.release(bench.term.epoch)
    term = await asyncio.wait_for(winning, 20)
    assert term.epoch > bench.term.epoch
    await standing_by.close()


async def test_a_stale_leader_is_fenced(bench: Bench) -> None:
    record = bench.submit("a")
    await bench.journal.flush()
    await bench.store.release(bench.term.epoch)
    await lease.win(bench.store, "you", 60.0, lambda: None)
    writing = asyncio.ensure_future(bench.journal.run())
    bench.iterate(record)
    with pytest.raises(FencedError):
        async with asyncio.timeout(30):
            await writing
    assert record.visible == 0
    with pytest.raises(FencedError):
        async with asyncio.timeout(30):
            await lease.keep(bench.store, Term(bench.term.epoch, "me", 0.1), bench.journal)
