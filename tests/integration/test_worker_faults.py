"""Workers that hang, are slow, talk nonsense, or cannot be reached: their jobs go elsewhere, every
token comes once, and a metric and a log line name the fault."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable

import pytest

from fastserve.proto.v1 import worker_pb2
from support.fake_worker import FakeWorker, expected_tokens
from support.gateway_client import GatewayClient, JobView, connected
from support.proxy import Proxy
from support.schedulers import RunningScheduler, running_scheduler
from support.valkey import Valkey
from support.waiting import eventually

JOBS = 20
TOKENS = 120


@contextlib.asynccontextmanager
async def two_workers(slower: float = 1.0) -> AsyncIterator[tuple[FakeWorker, FakeWorker]]:
    """The second one takes so many times as long."""
    good, bad = (
        FakeWorker(
            worker_id=name,
            device_blocks=2048,
            max_num_seqs=JOBS,
            iteration_s=0.005 * times,
            prefill_s=0.005 * times,
        )
        for name, times in (("good", 1.0), ("bad", slower))
    )
    async with good.serving(), bad.serving():
        yield good, bad
    assert good.violations == []


@contextlib.asynccontextmanager
async def loaded(
    valkey: Valkey, *workers: FakeWorker | str, **settings: float
) -> AsyncIterator[tuple[RunningScheduler, list[JobView], GatewayClient]]:
    """Twenty streams under way; at the end each has its tokens, every one once."""
    async with (
        running_scheduler(valkey, *workers, **settings) as scheduler,
        connected(scheduler.address) as gateway,
    ):
        views = [
            await gateway.submit(f"j{seed}", seed=seed, max_tokens=TOKENS) for seed in range(JOBS)
        ]
        for view in views:
            await view.accepted()
        yield scheduler, views, gateway
        for seed, view in enumerate(views):
            await view.finished(30)
            assert view.tokens == expected_tokens(seed, TOKENS)


def placed(scheduler: RunningScheduler) -> dict[str, int]:
    leader = scheduler.service.leader
    assert leader is not None
    return {link.worker_id: leader.core.jobs_of(link.worker_id)[0] for link in leader.engine.links}


def faults(scheduler: RunningScheduler, kind: str) -> float:
    return scheduler.metric("fastserve_worker_faults_total", kind=kind)


async def test_a_worker_that_hangs_loses_its_jobs(
    valkey: Valkey, capsys: pytest.CaptureFixture[str]
) -> None:
    async with two_workers() as (good, bad):
        async with loaded(valkey, good, bad, worker_timeout=0.3) as (scheduler, views, _):
            for view in views:
                await view.at_least(5)
            assert placed(scheduler)["bad"] >= JOBS // 4
            bad.gate.close()
            await eventually(lambda: faults(scheduler, "silent") >= 1, "the fault to be seen")
            await eventually(lambda: placed(scheduler).get("good") == JOBS, "jobs to go elsewhere")
        bad.gate.open()
    log = capsys.readouterr().out
    assert "fault=silent" in log and "bad has work and said nothing for" in log


async def test_an_idle_worker_is_not_taken_for_one_that_hangs(valkey: Valkey) -> None:
    async with (
        two_workers() as (good, bad),
        loaded(valkey, good, bad, worker_timeout=0.5) as (scheduler, views, _),
    ):
        for view in views:
            await view.finished()
        good.gate.close()
        bad.gate.close()
        # Several times the time-out, by the scheduler's own clock.
        leader = scheduler.service.leader
        assert leader is not None
        ticks = leader.engine.ticks + 30
        await eventually(lambda: leader.engine.ticks >= ticks, "a second and a half")
        assert faults(scheduler, "silent") == 0
        good.gate.open()
        bad.gate.open()


async def test_a_scheduler_that_stood_still_blames_no_worker(valkey: Valkey) -> None:
    """What they said meanwhile is there, but nobody has read it."""
    async with (
        two_workers() as (good, bad),
        loaded(valkey, good, bad, worker_timeout=0.3) as (scheduler, views, _),
    ):
        for view in views:
            await view.at_least(5)
        time.sleep(1.0)  # all of the process, as when its machine is paused
        for view in views:
            await view.finished()
        assert faults(scheduler, "silent") == 0


async def test_a_slow_worker_gets_fewer_jobs_and_is_named(
    valkey: Valkey, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        two_workers(slower=10.0) as (good, bad),
        loaded(valkey, good, bad) as (scheduler, _, _),
    ):
        assert placed(scheduler)["bad"] <= 3  # a tenth of the speed
        name = "fastserve_worker_slowdown_ratio"
        await eventually(lambda: scheduler.metric(name, worker="bad") > 5, "the metric")
        assert scheduler.metric(name, worker="good") == 1
    assert "a worker is slow" in capsys.readouterr().out


def _unknown_handle(report: worker_pb2.IterationReport) -> None:
    report.row_handles[0] = 999


def _iteration_of_the_past(report: worker_pb2.IterationReport) -> None:
    report.iteration += 7


def _unequal_arrays(report: worker_pb2.IterationReport) -> None:
    report.sampled_tokens.append(1)


def _never_sent(report: worker_pb2.IterationReport) -> None:
    report.plan_id += 1000


def _operation_never_sent(report: worker_pb2.IterationReport) -> None:
    report.done_op_ids.append(77)
    report.done_status.append(worker_pb2.KV_STATUS_OK)
    report.done_tokens.append(1)
    report.done_bytes.append(1)
    report.done_seconds.append(1)


def _more_than_there_is(report: worker_pb2.IterationReport) -> None:
    report.row_computed[0] = 1_000_000


def _no_time(report: worker_pb2.IterationReport) -> None:
    report.seconds = float("nan")


NONSENSE = [
    _unknown_handle,
    _iteration_of_the_past,
    _unequal_arrays,
    _never_sent,
    _operation_never_sent,
    _more_than_there_is,
    _no_time,
]


@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_a_worker_that_talks_nonsense_loses_its_jobs(
    valkey: Valkey,
    nonsense: Callable[[worker_pb2.IterationReport], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with two_workers() as (good, bad):
        async with loaded(valkey, good, bad) as (scheduler, views, _):
            for view in views:
                await view.at_least(5)
            assert placed(scheduler)["bad"] >= JOBS // 4
            bad.mangle = nonsense
            await eventually(lambda: faults(scheduler, "protocol") >= 1, "the fault to be seen")
            await eventually(lambda: placed(scheduler).get("good") == JOBS, "jobs to go elsewhere")
            streams = bad.streams
        # It is not tried again at once, or it would take jobs and lose them all the time.
        assert bad.streams <= streams + 1
    assert "fault=protocol" in capsys.readouterr().out


async def test_a_network_that_drops_costs_no_token(
    valkey: Valkey, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        two_workers() as (good, bad),
        Proxy(bad.address).running() as proxy,
        loaded(valkey, good, proxy.address) as (scheduler, views, _),
    ):
        for view in views:
            await view.at_least(5)
        prefilled = sum(bad.prefilled.values())
        for connection in (2, 3, 4):
            proxy.drop()
            await proxy.connected(connection)
            await eventually(lambda: len(placed(scheduler)) == 2, "the worker again")
        assert faults(scheduler, "stream_lost") >= 1
        # Jobs whose KV cache it still had came back to it.
        assert sum(bad.prefilled.values()) < prefilled + JOBS * 20
        proxy.drop(refuse=True)
        await eventually(lambda: placed(scheduler) == {"good": JOBS}, "jobs to go elsewhere")
    assert "fault=stream_lost" in capsys.readouterr().out


async def test_a_report_that_is_too_large_is_named(
    valkey: Valkey, capsys: pytest.CaptureFixture[str]
) -> None:
    def huge(report: worker_pb2.IterationReport) -> None:
        report.failed_handles.append(report.row_handles[0])
        report.failures.append("x" * (65 << 20))

    async with two_workers() as (good, bad), loaded(valkey, good, bad) as (scheduler, views, _):
        for view in views:
            await view.at_least(5)
        bad.mangle = huge
        await eventually(lambda: faults(scheduler, "message_too_large") >= 1, "the fault")
        bad.mangle = lambda _: None
    log = capsys.readouterr().out
    assert "fault=message_too_large" in log and "larger than max" in log
