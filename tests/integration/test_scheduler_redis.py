"""Redis full, slow, locked or gone for long: answers go on, and it is said what to do about it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from fastserve.scheduler.store import Store
from fastserve.scheduler.store_errors import ADVICE, Trouble
from fastserve.scheduler.stored import StoredJob
from support.fake_worker import FakeWorker, expected_tokens
from support.gateway_client import GatewayClient, JobView, connected
from support.schedulers import RunningScheduler, running_scheduler, start_scheduler
from support.slow_redis import slow_redis
from support.valkey import Valkey
from support.waiting import eventually

ERRORS = "fastserve_redis_errors_total"
# For a Redis that answers, whatever: a busy machine is no reason to think that it does not.
PATIENT = {"redis_timeout": 5.0, "leader_ttl": 20.0}


@pytest.fixture
async def worker() -> AsyncIterator[FakeWorker]:
    worker = FakeWorker(device_blocks=2048, max_model_len=8192, iteration_s=0.005)
    async with worker.serving():
        yield worker
    assert worker.violations == []


async def in_redis(valkey: Valkey) -> dict[str, StoredJob]:
    store = Store(valkey.url, "0", timeout_s=5.0)
    try:
        return {job.job_id: job for job in await store.load()}
    finally:
        await store.close()


async def ends_well(view: JobView, seed: int, count: int) -> None:
    await view.finished()
    assert view.tokens == expected_tokens(seed, count)


async def recovers(scheduler: RunningScheduler) -> None:
    await eventually(lambda: scheduler.metric("fastserve_durable") == 1, "durability")


async def goes_on_from_memory(scheduler: RunningScheduler, view: JobView) -> None:
    await eventually(lambda: scheduler.metric("fastserve_durable") == 0, "the loss")
    await view.at_least(len(view.tokens) + 10)


async def test_a_full_redis(valkey: Valkey, worker: FakeWorker) -> None:
    async with (
        running_scheduler(valkey, worker, **PATIENT) as scheduler,
        connected(scheduler.address) as gateway,
        Redis.from_url(valkey.url) as redis,
    ):
        view = await gateway.submit("a", seed=1, max_tokens=600)
        await view.at_least(5)
        with capture_logs() as logs:
            await redis.config_set("maxmemory", "1")
            await goes_on_from_memory(scheduler, view)
        (line,) = [entry for entry in logs if entry["event"].startswith("redis failed")]
        assert (line["kind"], line["log_level"]) == (Trouble.OUT_OF_MEMORY, "error")
        assert "maxmemory" in line["advice"]
        assert scheduler.metric(ERRORS, kind="out_of_memory") >= 1
        await redis.config_set("maxmemory", "0")
        await recovers(scheduler)
        await ends_well(view, 1, 600)
        assert scheduler.leads
    assert (await in_redis(valkey))["a"].output == expected_tokens(1, 600)


async def test_a_slow_redis_delays_answers_and_nothing_else(
    valkey: Valkey, worker: FakeWorker
) -> None:
    with capture_logs() as logs:
        async with (
            slow_redis(valkey) as slow,
            running_scheduler(valkey, worker, redis_url=slow.url, **PATIENT) as scheduler,
            connected(scheduler.address) as gateway,
        ):
            view = await gateway.submit("a", seed=1, max_tokens=300)
            await view.at_least(5)
            slow.delay_s = 0.1
            before = worker.iterations
            await ends_well(view, 1, 300)
            # 300 tokens at 10 writes a second would take 30 s if each waited for its own.
            assert worker.iterations - before >= 250
            assert scheduler.metric(ERRORS, kind="slow") >= 3
            assert scheduler.metric("fastserve_durable") == 1
            assert scheduler.metric(ERRORS, kind="timeout") == 0
            slow.delay_s = 0.0
    # The first slow round trip is told, then one in ten seconds.
    line = next(entry for entry in logs if entry["event"] == "redis is slow")
    assert line["advice"] == ADVICE[Trouble.SLOW]
    assert line["took_s"] > 0.05


async def test_a_password_that_changed(valkey: Valkey, worker: FakeWorker) -> None:
    async with (
        running_scheduler(valkey, worker, **PATIENT) as scheduler,
        connected(scheduler.address) as gateway,
        Redis.from_url(valkey.url) as redis,
    ):
        view = await gateway.submit("a", seed=1, max_tokens=600)
        await view.at_least(5)
        with capture_logs() as logs:
            await redis.config_set("requirepass", "new")
            await redis.auth("new")
            await redis.client_kill_filter(_type="normal", skipme=True)
            await goes_on_from_memory(scheduler, view)
            await eventually(lambda: scheduler.metric(ERRORS, kind="password"), "the cause")
            await eventually(
                lambda: any(entry.get("kind") is Trouble.PASSWORD for entry in logs), "its line"
            )
        lines = [entry for entry in logs if entry.get("kind") is Trouble.PASSWORD]
        assert len(lines) == 1
        assert "password" in lines[0]["advice"]
        await redis.config_set("requirepass", "")
        await recovers(scheduler)
        await ends_well(view, 1, 600)


async def test_a_wrong_password_at_start(valkey: Valkey, worker: FakeWorker) -> None:
    async with Redis.from_url(valkey.url) as redis:
        await redis.config_set("requirepass", "secret")
        await redis.auth("secret")
        with capture_logs() as logs:
            scheduler = await start_scheduler(valkey, worker, redis_url=f"{valkey.url}?password=no")
            try:
                await eventually(lambda: scheduler.metric(ERRORS, kind="password") > 2)
                (line,) = [entry for entry in logs if entry["event"].startswith("redis")]
                assert line["kind"] is Trouble.PASSWORD
                assert line["advice"] == ADVICE[Trouble.PASSWORD]
                assert not scheduler.leads
                await redis.acl_setuser("default", enabled=True, passwords="+no")
                await scheduler.ready()  # it was waited for
            finally:
                await scheduler.stop()


@pytest.mark.parametrize("outage_s", [3.0, pytest.param(30.0, marks=pytest.mark.slow)])
async def test_an_outage_is_served_through(
    valkey: Valkey, worker: FakeWorker, outage_s: float
) -> None:
    """Jobs come and go meanwhile. Redis comes back empty and gets all that there is."""
    grace = 0.5
    async with (
        running_scheduler(valkey, worker, grace=grace) as scheduler,
        connected(scheduler.address) as gateway,
    ):
        length = int(outage_s * 150)
        long = await gateway.submit("long", seed=1, max_tokens=length)
        await long.at_least(5)
        valkey.stop()
        await goes_on_from_memory(scheduler, long)
        served = await _churn(scheduler, gateway, time.monotonic() + outage_s)
        leader = scheduler.service.leader
        assert leader is not None
        # The backlog is the job table: what lives, and what ended within the grace.
        assert served > 2 * len(leader.jobs)
        assert len(leader.journal._dirty) <= len(leader.jobs)
        assert leader.journal.backlog == len(leader.jobs)
        await eventually(lambda: scheduler.metric("fastserve_redis_backlog_jobs") > 0)
        last = await gateway.submit("last", seed=2, max_tokens=400)
        await last.accepted()
        valkey.start()
        await recovers(scheduler)
        await scheduler.kill()
        held = await in_redis(valkey)
        # On a slow machine the outage outlasts a job: then it ended with all of its tokens.
        live = [
            job for job in ((long, 1, length), (last, 2, 400)) if not (job[0].finish and _all(*job))
        ]
        for view, seed, _ in live:
            output = list(held[view.job_id].output)
            assert output == expected_tokens(seed, len(output))
            assert len(output) >= len(view.tokens), "a client saw what Redis does not hold"
    async with running_scheduler(valkey, worker) as second, connected(second.address) as gateway:
        for view, seed, count in live:
            rest = await gateway.attach(view.job_id, len(view.tokens))
            await rest.finished()
            assert view.tokens + rest.tokens == expected_tokens(seed, count)


def _all(view: JobView, seed: int, count: int) -> bool:
    assert view.tokens == expected_tokens(seed, count)
    return True


async def _churn(scheduler: RunningScheduler, gateway: GatewayClient, until: float) -> int:
    """Short jobs, one after the other, which must all be served; how many."""
    count = 0
    while time.monotonic() < until:
        view = await gateway.submit(f"short-{count}", seed=count, max_tokens=3)
        await view.finished()
        assert view.tokens == expected_tokens(count, 3)
        assert scheduler.metric("fastserve_durable") == 0
        count += 1
        await asyncio.sleep(0)
    return count


async def test_a_redis_that_restarted_empty_holds_everything_again(
    valkey: Valkey, worker: FakeWorker
) -> None:
    async with (
        running_scheduler(valkey, worker, max_num_seqs=2) as scheduler,
        connected(scheduler.address) as gateway,
    ):
        ended = await (await gateway.submit("ended", seed=9)).finished()
        worker.gate.close()
        names = [f"job-{number}" for number in range(30)]
        views = [
            await gateway.submit(name, seed=seed, max_tokens=40) for seed, name in enumerate(names)
        ]
        for view in views:
            await view.accepted()
        leader = scheduler.service.leader
        assert leader is not None
        before = leader.snapshot(include_jobs=False).workers[0].iterations
        await worker.gate.step(10)
        # Nothing changes any more once all that ran was heard of.
        await eventually(
            lambda: leader.snapshot(include_jobs=False).workers[0].iterations == before + 10,
            "ten iterations",
        )
        valkey.stop()
        valkey.start()
        # Whoever looks while everything is written anew may find it gone once more.
        await eventually(lambda: leader.journal.losses >= 1 and leader.journal.durable)
        await leader.journal.flush()
        held = await in_redis(valkey)
        assert held.keys() == {*names, "ended"}
        assert held["ended"].output == ended.tokens
        async with Redis.from_url(valkey.url, decode_responses=True) as redis:
            assert await redis.get("fastserve:{0}:epoch") == str(gateway.welcome.epoch)
            assert await redis.hkeys("fastserve:{0}:workers") == ["w0"]
            for name in names:
                job = leader.core.job(name)
                assert job is not None
                assert held[name].level == job.level
                assert await redis.zscore(f"fastserve:{{0}}:level:{job.level}", name) == job.place
        await scheduler.kill()
    worker.gate.open()
    async with running_scheduler(valkey, worker) as second, connected(second.address) as gateway:
        for seed, view in enumerate(views):
            rest = await gateway.attach(view.job_id, len(view.tokens))
            await rest.finished()
            assert view.tokens + rest.tokens == expected_tokens(seed, 40)
