"""Worker groups that leave: their jobs go on elsewhere, and no token is lost, repeated or changed.

Workers are fakes, whose tokens depend on seed and position alone, or real ones with a tiny model.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from fastserve.common import rpc
from fastserve.proto.v1 import scheduler_pb2, scheduler_pb2_grpc
from support.fake_worker import FakeWorker, expected_tokens
from support.gateway_client import GatewayClient, JobView, connected
from support.schedulers import RunningScheduler, running_scheduler
from support.valkey import Valkey
from support.waiting import eventually

TOKENS = 120


@contextlib.asynccontextmanager
async def fakes(*names: str, iteration_s: float = 0.005) -> AsyncIterator[list[FakeWorker]]:
    async with contextlib.AsyncExitStack() as stack:
        workers = [
            FakeWorker(worker_id=name, device_blocks=1024, iteration_s=iteration_s)
            for name in names
        ]
        for worker in workers:
            await stack.enter_async_context(worker.serving())
        yield workers
    for worker in workers:
        assert worker.violations == []


async def submitted(gateway: GatewayClient, count: int, tokens: int = TOKENS) -> list[JobView]:
    views = [
        await gateway.submit(f"job-{seed}", seed=seed, max_tokens=tokens) for seed in range(count)
    ]
    for view in views:
        await view.accepted()
    return views


async def complete(views: list[JobView], tokens: int = TOKENS) -> None:
    for seed, view in enumerate(views):
        await view.finished(30)
        assert view.tokens == expected_tokens(seed, tokens)


def placed(scheduler: RunningScheduler) -> dict[str, int]:
    leader = scheduler.service.leader
    assert leader is not None
    return {link.worker_id: leader.core.jobs_of(link.worker_id)[0] for link in leader.engine.links}


async def drain(
    scheduler: RunningScheduler, worker_id: str, *, undo: bool = False
) -> scheduler_pb2.DrainResponse:
    async with rpc.channel(scheduler.address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        request = scheduler_pb2.DrainRequest(worker_id=worker_id, undo=undo)
        return await stub.Drain(request, timeout=20)


async def test_jobs_are_spread_over_two_groups(valkey: Valkey) -> None:
    async with (
        fakes("a", "b") as workers,
        running_scheduler(valkey, *workers) as scheduler,
        connected(scheduler.address) as gateway,
    ):
        views = await submitted(gateway, 12)
        assert sorted(placed(scheduler).values()) == [6, 6]
        await complete(views)


async def test_a_worker_that_asks_is_drained_and_may_leave(valkey: Valkey) -> None:
    """Scaling down drains (dynamo #13559)."""
    async with (
        fakes("a", "b") as (first, second),
        running_scheduler(valkey, first, second) as scheduler,
        connected(scheduler.address) as gateway,
    ):
        views = await submitted(gateway, 12)
        for view in views:
            await view.at_least(10)
        assert placed(scheduler)["a"] == 6
        first.drain()
        async with asyncio.timeout(30):
            await first.may_leave.wait()
        assert placed(scheduler) == {"a": 0, "b": 12}
        assert first.held == {}, "something of a job stays behind"
        later = await gateway.submit("later", seed=99, max_tokens=5)
        await later.finished()
        assert placed(scheduler)["a"] == 0
        await complete(views)
        await eventually(
            lambda: scheduler.metric("fastserve_migrations_total", cause="drain") == 6, "a count"
        )
        assert scheduler.metric("fastserve_workers_draining") == 1


async def test_without_another_group_jobs_end_where_they_are(valkey: Valkey) -> None:
    async with (
        fakes("a") as (worker,),
        running_scheduler(valkey, worker) as scheduler,
        connected(scheduler.address) as gateway,
    ):
        views = await submitted(gateway, 4)
        worker.drain()
        await eventually(lambda: not gateway.welcome.ready, "nobody who takes jobs")
        refused = await (await gateway.submit("later")).refused()
        assert refused.reason == scheduler_pb2.REJECT_REASON_NO_WORKER
        assert not worker.may_leave.is_set()
        await complete(views)
        async with asyncio.timeout(30):
            await worker.may_leave.wait()


async def test_an_order_to_drain_outlives_the_leader_and_can_be_undone(valkey: Valkey) -> None:
    async with fakes("a", "b") as (first, second):
        async with (
            running_scheduler(valkey, first, second) as scheduler,
            connected(scheduler.address) as gateway,
        ):
            views = await submitted(gateway, 4)
            reply = await drain(scheduler, "b")
            assert reply.others == 1
            await eventually(lambda: placed(scheduler) == {"a": 4, "b": 0}, "all jobs at a")
            await eventually(lambda: second.described.draining, "the worker to know")
            await complete(views)
        async with (
            running_scheduler(valkey, first, second) as scheduler,
            connected(scheduler.address) as gateway,
        ):
            snapshot = await scheduler.snapshot()
            assert {w.worker_id: w.draining for w in snapshot.workers} == {"a": False, "b": True}
            more = [await gateway.submit(f"more-{n}", seed=n, max_tokens=50) for n in range(4)]
            for view in more:
                await view.accepted()
            assert placed(scheduler) == {"a": 4, "b": 0}
            await drain(scheduler, "b", undo=True)
            await eventually(lambda: not second.described.draining, "the worker to know")
            again = await (await gateway.submit("again", seed=9, max_tokens=50)).accepted()
            assert placed(scheduler)["b"] >= 1
            await complete(more, 50)
            await again.finished()


async def test_a_group_that_comes_takes_the_jobs_of_one_that_leaves(valkey: Valkey) -> None:
    """A rolling update of one replica, surge first."""
    async with fakes("old", "new") as (old, new):
        await new.stop()
        async with (
            running_scheduler(valkey, old) as scheduler,
            connected(scheduler.address) as gateway,
        ):
            views = await submitted(gateway, 6)
            old.drain()
            await views[0].at_least(20)
            assert placed(scheduler) == {"old": 6}, "there is nobody else"
        # The next scheduler knows both.
        await new.start()
        async with (
            running_scheduler(valkey, old, new) as scheduler,
            connected(scheduler.address) as gateway,
        ):
            rest = [await gateway.attach(view.job_id, len(view.tokens)) for view in views]
            async with asyncio.timeout(30):
                await old.may_leave.wait()
            for seed, (begun, view) in enumerate(zip(views, rest, strict=True)):
                await view.finished(30)
                assert begun.tokens + view.tokens == expected_tokens(seed, TOKENS)


async def command(
    *words: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "fastserve.cli", *words],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_an_unknown_worker_cannot_be_drained(valkey: Valkey) -> None:
    async with fakes("a") as (worker,), running_scheduler(valkey, worker) as scheduler:
        where = ("--scheduler", scheduler.address)
        done = await command("drain", "z", *where)
        assert (done.returncode, done.stderr.strip()) == (
            1,
            "no worker 'z' is connected (there are: a)",
        )
        done = await command("drain", "a", *where)
        assert done.returncode == 0 and "no jobs left" in done.stdout, done
        async with asyncio.timeout(30):
            await worker.may_leave.wait()
        done = await command("drain", "a", "--undo", *where)
        assert done.returncode == 0 and "takes new jobs again" in done.stdout, done


async def test_the_commands_speak_mutual_tls(valkey: Valkey, tmp_path: Path) -> None:
    worker = FakeWorker(worker_id="group-7", device_blocks=64)
    async with (
        worker.serving(f"unix:{tmp_path}/worker"),
        running_scheduler(
            valkey,
            worker,
            **{f"tls_{name}": path for name, path in _tls("peer").items()},
            tls_server_name="sidecar.test",
        ) as scheduler,
    ):
        where = ("--scheduler", scheduler.address)
        flags = [f"--tls-{name}={path}" for name, path in _tls("peer").items()]
        name = "--tls-server-name=sidecar.test"
        variables = {f"FASTSERVE_TLS_{key.upper()}": str(v) for key, v in _tls("peer").items()}

        drained, shown, plain, stranger, half = await asyncio.gather(
            command("drain", "group-7", *where, *flags, name),
            command("top", "--once", *where, name, env=variables),
            command("drain", "group-7", "--undo", *where),
            command(
                *("drain", "group-7", "--undo", *where, name),
                *(f"--tls-{name}={path}" for name, path in _tls("stranger").items()),
            ),
            command("top", "--once", *where, flags[0]),
        )
        assert drained.returncode == 0 and "no jobs left" in drained.stdout, drained
        assert shown.returncode == 0 and "group-7" in shown.stdout, shown
        for refused in (plain, stranger):
            assert refused.returncode == 1 and "no scheduler leads" in refused.stderr, refused
        assert (half.returncode, half.stderr.strip()) == (
            1,
            "settings: Value error, --tls-cert, --tls-key and --tls-ca go together",
        )
        async with asyncio.timeout(30):
            await worker.may_leave.wait()
    assert worker.violations == []


def _tls(cert: str) -> dict[str, Path]:
    folder = Path(__file__).parents[1] / "support" / "tls"
    return {"cert": folder / f"{cert}.crt", "key": folder / f"{cert}.key", "ca": folder / "ca.crt"}
