"""Jobs that are cancelled or left, schedulers that do not answer, and the gateway's own end."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from fastserve.gateway.jobs import SchedulerLostError
from fastserve.gateway.scheduler_client import SchedulerClient
from fastserve.proto.v1 import sampling_pb2, scheduler_pb2
from support.waiting import eventually
from unit.gateway.scripted_scheduler import (
    STOP,
    Follower,
    ScriptedScheduler,
    assert_serves,
    running_client,
    running_scheduler,
    started,
)

ALREADY_EXISTS = scheduler_pb2.REJECT_REASON_ALREADY_EXISTS
NOT_FOUND = scheduler_pb2.REJECT_REASON_NOT_FOUND
CANCELLED = sampling_pb2.FINISH_REASON_CANCELLED


async def test_cancel(scheduler: ScriptedScheduler, client: SchedulerClient) -> None:
    session = await scheduler.session()
    _, job = await started(client, session, 1)
    client.cancel(job)
    client.cancel(job)
    assert client.jobs == 0
    assert (await session.receive("cancel")).handles == [job.handle]
    await session.tokens(job.handle, 1, [2])  # was on its way
    await session.tokens(job.handle, 2, [], CANCELLED)
    await assert_serves(client, session)  # so the second cancel said nothing
    assert job.take() == ([], [])


async def test_cancel_of_a_job_that_has_ended(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    follower, job = await started(client, session)
    await session.tokens(job.handle, 0, [1], STOP)
    await follower.follow(job)
    client.cancel(job)
    await assert_serves(client, session)


async def test_request_that_ends_before_its_job_is_answered(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    submitting = Follower(client).submit("a")
    handle = (await session.receive("submit")).handle
    submitting.cancel()
    assert (await session.receive("cancel")).handles == [handle]
    await session.accept(handle)
    await assert_serves(client, session)


async def test_cancel_without_a_stream_follows_later(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    _, job = await started(client, session)
    session.end()
    session, _ = await scheduler.called()
    client.cancel(job)
    await session.welcome(ready=True)
    assert (await session.receive("attach")).job_id == "a"
    assert (await session.receive("cancel")).handles == [job.handle]
    await session.reject(job.handle, NOT_FOUND)
    await assert_serves(client, session)  # it is not submitted again


async def test_cancelled_submit_that_may_have_arrived_is_not_sent_again(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    submitting = Follower(client).submit("a")
    handle = (await session.receive("submit")).handle
    session.end()
    session, _ = await scheduler.called()
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    await session.welcome(ready=True)
    assert (await session.receive("attach")).job_id == "a"
    assert (await session.receive("cancel")).handles == [handle]
    await session.reject(handle, NOT_FOUND)
    await assert_serves(client, session)


async def test_cancelled_submit_that_had_arrived_before(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    submitting = Follower(client).submit("a")
    await session.receive("submit")
    session.end()
    session = await scheduler.session()
    handle = (await session.receive("submit")).handle
    submitting.cancel()
    assert (await session.receive("cancel")).handles == [handle]
    # The scheduler did not know the handle when it read that.
    await session.reject(handle, ALREADY_EXISTS)
    assert (await session.receive("attach")).job_id == "a"
    assert (await session.receive("cancel")).handles == [handle]
    await session.tokens(handle, 0, [1, 2], CANCELLED)
    await assert_serves(client, session)


async def test_job_that_is_cancelled_before_it_could_be_sent(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session, _ = await scheduler.called()
    submitting = Follower(client).submit("a")
    await eventually(lambda: client.jobs == 1, "the job")
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    assert client.jobs == 0
    await session.welcome(ready=True)
    await assert_serves(client, session)


async def test_detached_job_is_cancelled_in_the_end(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    _, job = await started(client, session, 1)
    client.detach(job, 0.01)
    assert client.jobs == 0
    assert (await session.receive("cancel")).handles == [job.handle]
    await assert_serves(client, session)


async def test_detached_job_is_taken_over_again(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    _, left = await started(client, session, 1)
    client.detach(left, 0.01)
    follower = Follower(client)
    attaching = follower.attach("a")
    attach = await session.receive("attach")
    assert attach.handle != left.handle
    assert (attach.job_id, attach.next_index) == ("a", 0)
    await session.tokens(attach.handle, 0, [1, 2])
    job = await attaching
    # The end of the grace is about the old handle alone.
    assert (await session.receive("cancel")).handles == [left.handle]
    await session.tokens(attach.handle, 2, [3], STOP)
    assert await follower.follow(job) == [1, 2, 3]
    assert left.take() == ([], [])


async def test_detached_job_is_not_introduced_to_the_next_stream(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    """Another gateway may follow it by then, and would lose it."""
    session = await scheduler.session()
    _, job = await started(client, session, 1)
    client.detach(job, 60)
    session.end()
    await assert_serves(client, await scheduler.session())


async def test_scheduler_that_does_not_answer(scheduler: ScriptedScheduler) -> None:
    async with running_client(scheduler.address, answer_timeout_s=0.05) as client:
        session = await scheduler.session()
        await eventually(lambda: client.connected, "the stream")
        submitting = Follower(client).submit("a")
        handle = (await session.receive("submit")).handle
        with pytest.raises(SchedulerLostError, match="does not answer"):
            await submitting
        assert (await session.receive("cancel")).handles == [handle]
        assert client.jobs == 0


async def test_a_scheduler_that_says_something_is_waited_for(
    scheduler: ScriptedScheduler,
) -> None:
    """After a burst it takes long to read all answers; only silence means that none will come."""
    async with running_client(scheduler.address, answer_timeout_s=0.8) as client:
        session = await scheduler.session()
        follower = Follower(client)
        submitting = follower.submit("a", prompt_token_ids=[7])
        submit = await session.receive("submit")
        for _ in range(20):  # longer than the time-out
            await asyncio.sleep(0.05)
            await session.welcome(ready=True)
        assert not submitting.done()
        await session.accept(submit.handle)
        assert (await submitting).job_id == "a"


async def test_no_scheduler_at_all(tmp_path: Path) -> None:
    submit = scheduler_pb2.Submit(job_id="a")
    async with running_client(f"unix:{tmp_path}/nobody", answer_timeout_s=0.05) as client:
        with pytest.raises(SchedulerLostError):
            await client.submit(submit, asyncio.Event())
        # It is known to be away now: nobody waits for it any more.
        async with asyncio.timeout(0):
            with pytest.raises(SchedulerLostError, match="cannot be reached"):
                await client.submit(submit, asyncio.Event())
            with pytest.raises(SchedulerLostError, match="cannot be reached"):
                await client.attach("a", asyncio.Event())
            with pytest.raises(SchedulerLostError, match="cannot be reached"):
                await client.limits()
        assert client.jobs == 0
        assert client.losses == 0
        assert not client.ready


async def test_limits_that_never_come(tmp_path: Path) -> None:
    async with running_client(f"unix:{tmp_path}/nobody", answer_timeout_s=0.05) as client:
        with pytest.raises(SchedulerLostError, match="cannot be reached"):
            await client.limits()


async def test_scheduler_that_stays_away(scheduler: ScriptedScheduler) -> None:
    """Jobs end after `reattach_timeout_s`, those that were followed and those that waited."""
    async with running_client(scheduler.address, reattach_timeout_s=0.2) as client:
        session = await scheduler.session()
        follower, job = await started(client, session, 1)
        stopped = time.monotonic()
        await scheduler.server.stop(0)
        assert await follower.follow(job) == [1]
        assert time.monotonic() - stopped >= 0.2
        assert "cannot be reached" in str(job.failure)
        with pytest.raises(SchedulerLostError, match="cannot be reached"):
            await client.submit(scheduler_pb2.Submit(job_id="b"), asyncio.Event())
        assert client.jobs == 0


@pytest.mark.parametrize("fault", ["silent", "ends", "says something else"])
async def test_scheduler_without_a_welcome_is_left(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastserve.gateway.scheduler_client._WELCOME_TIMEOUT_S", 1.0)
    async with (
        running_scheduler() as broken,
        running_scheduler() as healthy,
        running_client(broken.address, healthy.address) as client,
    ):
        session, _ = await broken.called()
        if fault == "ends":
            session.end()
        elif fault == "says something else":
            await session.accept(1)
        await assert_serves(client, await healthy.session())
        assert client.losses == 0


async def test_close_cancels_what_is_followed(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    follower, job = await started(client, session, 1)
    waiting = Follower(client).submit("b")
    handle = (await session.receive("submit")).handle
    await client.close()
    assert await follower.follow(job) == [1]
    assert "shutting down" in str(job.failure)
    with pytest.raises(SchedulerLostError, match="shutting down"):
        await waiting
    assert (await session.receive("cancel")).handles == [job.handle]
    assert (await session.receive("cancel")).handles == [handle]
    assert client.jobs == 0


async def test_the_end_of_run_ends_the_jobs_and_the_stream(scheduler: ScriptedScheduler) -> None:
    async with running_client(scheduler.address) as client:
        session = await scheduler.session()
        follower, job = await started(client, session, 1)
        waiting = Follower(client).submit("b")
        await session.receive("submit")
    assert await follower.follow(job) == [1]
    assert "shutting down" in str(job.failure)
    with pytest.raises(SchedulerLostError, match="shutting down"):
        await waiting
    assert not client.connected


async def test_close_without_a_stream(tmp_path: Path) -> None:
    async with running_client(f"unix:{tmp_path}/nobody") as client:
        waiting = Follower(client).submit("a")
        await eventually(lambda: client.jobs == 1, "the job")
        await client.close()
        with pytest.raises(SchedulerLostError, match="shutting down"):
            await waiting
