"""Schedulers and workers that die and come back: every token once, nothing lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio import Redis

from fastserve.common import rpc
from fastserve.proto.v1 import scheduler_pb2
from support.fake_worker import FakeWorker, expected_tokens
from support.gateway_client import connected
from support.schedulers import RunningScheduler, running_scheduler, start_scheduler
from support.valkey import Valkey
from support.waiting import eventually


@contextlib.asynccontextmanager
async def started(
    valkey: Valkey, *workers: FakeWorker, **settings: object
) -> AsyncIterator[RunningScheduler]:
    """A scheduler that need not lead."""
    scheduler = await start_scheduler(valkey, *workers, **settings)
    try:
        yield scheduler
    finally:
        if not scheduler.ended:
            await scheduler.stop()


async def health(address: str) -> int:
    async with rpc.channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status)


async def serving(address: str) -> None:
    for _ in range(500):
        if await health(address) == health_pb2.HealthCheckResponse.SERVING:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{address} does not serve")


# Schedulers


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_a_restarted_scheduler_goes_on_where_it_was(
    valkey: Valkey, worker: FakeWorker, end: str
) -> None:
    seen: dict[str, list[int]] = {}
    names = [f"job-{number}" for number in range(10)]
    async with running_scheduler(valkey, worker, max_num_seqs=4) as first:
        async with connected(first.address) as gateway:
            views = [
                await gateway.submit(name, seed=seed, max_tokens=150)
                for seed, name in enumerate(names)
            ]
            for view in views:
                await view.accepted()
            await views[0].at_least(20)
            await (first.stop() if end == "stop" else first.kill())
            await eventually(lambda: gateway.problem is not None)
        seen = {view.job_id: view.tokens for view in views}
    async with running_scheduler(valkey, worker) as second:
        async with connected(second.address) as gateway:
            rest = [await gateway.attach(name, len(seen[name])) for name in names]
            for seed, view in enumerate(rest):
                await (await view.accepted()).finished()
                assert seen[view.job_id] + view.tokens == expected_tokens(seed, 150)
        # What was computed was not computed again: the worker still had it.
        assert all(tokens <= 160 for tokens in worker.prefilled.values())


async def test_an_ended_job_outlives_its_scheduler(valkey: Valkey, worker: FakeWorker) -> None:
    async with running_scheduler(valkey, worker) as first, connected(first.address) as gateway:
        await (await gateway.submit("a", seed=3)).finished()
    async with running_scheduler(valkey, worker) as second, connected(second.address) as gateway:
        view = await gateway.attach("a", 5)
        await view.finished()
        assert view.tokens == expected_tokens(3, 8)[5:]
        refused = await (await gateway.submit("a")).refused()
        assert refused.reason == scheduler_pb2.REJECT_REASON_ALREADY_EXISTS


async def test_a_standby_takes_over_from_a_killed_leader(
    valkey: Valkey, worker: FakeWorker
) -> None:
    async with (
        started(valkey, worker, leader_ttl=2.0) as leader,
        contextlib.AsyncExitStack() as stack,
    ):
        await leader.ready()
        standby = await stack.enter_async_context(started(valkey, worker, leader_ttl=2.0))
        await standby.service.answered.wait()
        assert await health(leader.address) == health_pb2.HealthCheckResponse.SERVING
        assert await health(standby.address) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            async with connected(standby.address):
                pass
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        async with connected(leader.address) as gateway:
            view = await gateway.submit("a", seed=1, max_tokens=1500)
            await view.at_least(10)
            epoch = gateway.welcome.epoch
            await leader.kill()
            killed = time.monotonic()
        await standby.ready()
        assert time.monotonic() - killed < 3.0
        assert await health(standby.address) == health_pb2.HealthCheckResponse.SERVING
        async with connected(standby.address) as gateway:
            assert gateway.welcome.epoch > epoch
            rest = await gateway.attach("a", len(view.tokens))
            await rest.finished()
        assert view.tokens + rest.tokens == expected_tokens(1, 1500)


async def test_a_leader_that_slept_is_fenced(valkey: Valkey, worker: FakeWorker) -> None:
    """Its lease was taken while it did not look: nothing it writes or says counts any more."""
    async with started(valkey, worker, leader_ttl=30.0) as old:
        await old.ready()
        async with connected(old.address) as gateway:
            worker.gate.close()
            view = await gateway.submit("a", seed=1, max_tokens=60)
            await view.accepted()
            await worker.gate.step(5)
            await view.at_least(3)
            async with Redis.from_url(valkey.url) as redis:
                await redis.delete("fastserve:{0}:lease")
            async with running_scheduler(valkey, worker, leader_ttl=30.0) as new:
                await eventually(lambda: not old.leads, "stepping down")
                await eventually(lambda: gateway.problem is not None)
                worker.gate.open()
                async with connected(new.address) as other:
                    rest = await other.attach("a", len(view.tokens))
                    await rest.finished()
                assert view.tokens + rest.tokens == expected_tokens(1, 60)
                assert not old.ended  # a standby now


async def test_jobs_whose_clients_do_not_return_end_after_a_restart(
    valkey: Valkey, worker: FakeWorker
) -> None:
    async with running_scheduler(valkey, worker) as first, connected(first.address) as gateway:
        worker.gate.close()
        await (await gateway.submit("a", max_tokens=100)).accepted()
    async with running_scheduler(valkey, worker, grace=0.3) as second:
        await eventually(lambda: second.metric("fastserve_requests_total", outcome="cancelled"))
        worker.gate.open()
        await eventually(lambda: worker.held == {}, "release at the worker")


async def test_redis_is_waited_for(valkey: Valkey, worker: FakeWorker) -> None:
    valkey.stop()
    async with started(valkey, worker) as scheduler:
        assert await health(scheduler.address) == health_pb2.HealthCheckResponse.NOT_SERVING
        await asyncio.sleep(0.3)
        assert not scheduler.leads
        valkey.start()
        await scheduler.ready()
        async with connected(scheduler.address) as gateway:
            await (await gateway.submit("a")).finished()


# Workers


@pytest.mark.parametrize("loss", ["stream", "device", "everything"])
async def test_a_worker_that_comes_back(valkey: Valkey, worker: FakeWorker, loss: str) -> None:
    async with (
        running_scheduler(valkey, worker) as scheduler,
        connected(scheduler.address) as gateway,
    ):
        views = [
            await gateway.submit(f"j{number}", seed=number, max_tokens=200) for number in range(3)
        ]
        for view in views:
            await view.at_least(30)
        before = dict(worker.prefilled)
        if loss == "stream":
            worker.break_stream()
        else:
            worker.lose_kv(host=loss == "everything")
        await eventually(lambda: worker.streams == 2)
        for number, view in enumerate(views):
            await view.finished()
            assert view.tokens == expected_tokens(number, 200)
        again = sum(worker.prefilled.values()) - sum(before.values())
        assert again == 0 if loss == "stream" else again >= 90


async def test_a_worker_process_replaced_at_its_address(valkey: Valkey, tmp_path: Path) -> None:
    first = FakeWorker(device_blocks=512)
    await first.start(f"unix:{tmp_path}/worker")
    async with (
        running_scheduler(valkey, first) as scheduler,
        connected(scheduler.address) as gateway,
    ):
        view = await gateway.submit("a", seed=5, max_tokens=300)
        await view.at_least(20)
        await first.stop()
        await eventually(lambda: not gateway.welcome.ready)
        second = FakeWorker(device_blocks=512)
        second.described.epoch = 2
        async with second.serving(first.address):
            await view.finished()
        assert view.tokens == expected_tokens(5, 300)
        assert second.violations == []


async def test_a_worker_with_another_model_is_not_used(valkey: Valkey, worker: FakeWorker) -> None:
    async with (
        FakeWorker(worker_id="w1", model="another").serving() as stranger,
        started(valkey, worker, stranger) as scheduler,
    ):
        await scheduler.ready(1)
        leader = scheduler.service.leader
        assert leader is not None
        await eventually(lambda: worker.streams + stranger.streams >= 3)
        assert len(leader.engine.links) == 1


async def test_jobs_spread_over_two_workers(valkey: Valkey, worker: FakeWorker) -> None:
    async with FakeWorker(worker_id="w1", device_blocks=512).serving() as other:
        async with (
            running_scheduler(valkey, worker, other) as scheduler,
            connected(scheduler.address) as gateway,
        ):
            views = [
                await gateway.submit(f"j{number}", seed=number, max_tokens=60)
                for number in range(12)
            ]
            for number, view in enumerate(views):
                await view.finished()
                assert view.tokens == expected_tokens(number, 60)
            assert worker.iterations > 0
            assert other.iterations > 0
        assert other.violations == []


# The process


async def test_the_process_killed_and_started_again(
    valkey: Valkey, worker: FakeWorker, tmp_path: Path
) -> None:
    ready = tmp_path / "ready.json"
    command = [
        *(sys.executable, "-m", "fastserve.scheduler", "--listen", f"unix:{valkey.socket}.grpc"),
        *("--worker", worker.address, "--redis-url", valkey.url, "--leader-ttl", "0.5"),
        *("--ready-file", str(ready)),
    ]
    seen: list[int] = []
    for life in range(3):
        ready.unlink(missing_ok=True)
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
        try:
            await eventually(ready.exists, "the ready file", timeout=30)
            info = json.loads(ready.read_text())
            assert info["pid"] == process.pid
            assert info["metrics_port"] > 0
            await serving(info["address"])
            async with connected(info["address"]) as gateway:
                if not life:
                    await eventually(lambda: gateway.welcome.ready, "the worker's stream")
                    view = await gateway.submit("a", seed=7, max_tokens=1000)
                else:
                    view = await gateway.attach("a", len(seen))
                await (view.finished() if life == 2 else view.at_least(50))
                os.kill(process.pid, signal.SIGTERM if life == 2 else signal.SIGKILL)
                code = await asyncio.wait_for(process.wait(), 15)
                assert code == (0 if life == 2 else -signal.SIGKILL)
            seen += view.tokens
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert seen == expected_tokens(7, 1000)


async def test_a_wrong_policy_is_one_sentence(valkey: Valkey) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fastserve.scheduler", "--worker", "127.0.0.1:1"),
        *("--redis-url", valkey.url, "--policy", "shortest", "--listen", "127.0.0.1:0"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 2
    assert errors.decode().splitlines()[-1].startswith("fastserve-scheduler: ")
    assert b"shortest" in errors
    assert b"Traceback" not in errors
