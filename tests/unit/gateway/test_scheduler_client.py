"""The gateway's stream to the scheduler: it may break at any moment, requests see a pause."""

from __future__ import annotations

import asyncio

import pytest
from grpc import StatusCode

from fastserve.gateway.jobs import JobRefusedError
from fastserve.gateway.scheduler_client import SchedulerClient
from fastserve.proto.v1 import scheduler_pb2
from support.waiting import eventually
from unit.gateway.scripted_scheduler import (
    STOP,
    UNFINISHED,
    Follower,
    ScriptedScheduler,
    assert_serves,
    running_client,
    running_scheduler,
    started,
)

ALREADY_EXISTS = scheduler_pb2.REJECT_REASON_ALREADY_EXISTS
NOT_FOUND = scheduler_pb2.REJECT_REASON_NOT_FOUND


async def test_hello_and_welcome(scheduler: ScriptedScheduler, client: SchedulerClient) -> None:
    limits = asyncio.ensure_future(client.limits())
    session, hello = await scheduler.called()
    assert hello.gateway_id == "gateway-1"
    assert not client.connected
    assert not limits.done()
    await session.welcome(ready=False, max_job_tokens=100)
    assert (await limits).max_job_tokens == 100
    assert client.connected
    assert not client.ready
    await session.welcome(ready=True, max_job_tokens=200)
    await eventually(lambda: client.ready, "a worker")
    assert (await client.limits()).max_job_tokens == 200


async def test_changes_are_told(scheduler: ScriptedScheduler) -> None:
    told: list[tuple[bool, bool]] = []

    def note() -> None:
        told.append((running.connected, running.ready))

    async with running_client(scheduler.address, on_change=note) as running:
        session, _ = await scheduler.called()
        await session.welcome(ready=False)
        await session.welcome(ready=True)
        session.end()
        await scheduler.called()
        assert running.losses == 1
        assert (await running.limits()).ready  # the last Welcome, though disconnected
        assert told == [(True, False), (True, True), (False, False)]


async def test_jobs_share_the_stream(scheduler: ScriptedScheduler, client: SchedulerClient) -> None:
    session = await scheduler.session()
    first, job_a = await started(client, session)
    second, job_b = await started(client, session, 5, job_id="b")
    assert job_a.handle != job_b.handle
    assert client.jobs == 2
    await session.send(
        tokens=scheduler_pb2.TokenBatch(
            handles=[job_a.handle, 10**6, job_b.handle],  # the middle one is unknown
            first_indexes=[0, 3, 1],
            token_counts=[2, 1, 1],
            finish_reasons=[STOP, UNFINISHED, STOP],
            tokens=[1, 2, 99, 6],
            has_logprobs=[0, 0, 0],
        )
    )
    assert await first.follow(job_a) == [1, 2]
    assert await second.follow(job_b) == [5, 6]
    assert client.jobs == 0


async def test_tokens_are_as_good_as_accepted(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    follower = Follower(client)
    submitting = follower.submit("a")
    submit = await session.receive("submit")
    await session.tokens(submit.handle, 0, [1], STOP)
    assert await follower.follow(await submitting) == [1]


@pytest.mark.parametrize("status", [StatusCode.OK, StatusCode.UNAVAILABLE, StatusCode.INTERNAL])
async def test_stream_broken_in_the_middle_of_an_answer(
    scheduler: ScriptedScheduler, client: SchedulerClient, status: StatusCode
) -> None:
    session = await scheduler.session()
    follower, job = await started(client, session, 1, 2)
    session.end(status)
    session = await scheduler.session()
    attach = await session.receive("attach")
    assert (attach.handle, attach.job_id, attach.next_index) == (job.handle, "a", 2)
    await session.accept(job.handle)
    await session.tokens(job.handle, 1, [2, 3])
    assert await follower.follow(job, 3) == [1, 2, 3]
    # Once more, with all of the replay known already.
    session.end(status)
    session = await scheduler.session()
    assert (await session.receive("attach")).next_index == 3
    await session.tokens(job.handle, 0, [1, 2, 3])
    await session.tokens(job.handle, 3, [4], STOP)
    assert await follower.follow(job) == [1, 2, 3, 4]
    assert client.losses == 2
    await assert_serves(client, session)


async def test_another_scheduler_takes_over() -> None:
    async with (
        running_scheduler() as leader,
        running_scheduler() as standby,
        running_client(leader.address, standby.address) as client,
    ):
        session = await leader.session()
        follower, job = await started(client, session, 1)
        await leader.server.stop(0)
        session = await standby.session()
        assert (await session.receive("attach")).next_index == 1
        await session.tokens(job.handle, 1, [2], STOP)
        assert await follower.follow(job) == [1, 2]


async def test_every_job_is_introduced_again(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    await started(client, session, 1, 2)
    await started(client, session)
    ended, job = await started(client, session, 1)
    await session.tokens(job.handle, 1, [2], STOP)
    await ended.follow(job)
    session.end()
    session = await scheduler.session()
    assert [(await session.receive("attach")).next_index for _ in range(2)] == [2, 0]
    assert client.jobs == 2


async def test_a_job_of_the_time_without_a_stream_is_submitted_later(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    follower = Follower(client)
    submitting = follower.submit("a")
    session = await scheduler.session()
    submit = await session.receive("submit")
    await session.tokens(submit.handle, 0, [1], STOP)
    assert await follower.follow(await submitting) == [1]


async def test_a_submit_without_an_answer_is_sent_again(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    follower = Follower(client)
    submitting = follower.submit("a", prompt_token_ids=[7, 8])
    first = await session.receive("submit")
    session.end()
    session = await scheduler.session()
    assert await session.receive("submit") == first
    await session.tokens(first.handle, 0, [1], STOP)
    assert await follower.follow(await submitting) == [1]


async def test_a_submit_that_had_arrived_before_is_attached_to(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    follower = Follower(client)
    submitting = follower.submit("a")
    await session.receive("submit")
    session.end()
    session = await scheduler.session()
    handle = (await session.receive("submit")).handle
    await session.reject(handle, ALREADY_EXISTS)
    attach = await session.receive("attach")
    assert (attach.handle, attach.job_id, attach.next_index) == (handle, "a", 0)
    assert not submitting.done()
    await session.tokens(handle, 0, [1, 2], STOP)
    assert await follower.follow(await submitting) == [1, 2]


async def test_a_lost_job_without_tokens_is_submitted_again(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    follower, job = await started(client, session)
    session.end()
    session = await scheduler.session()
    await session.receive("attach")
    await session.reject(job.handle, NOT_FOUND)
    submit = await session.receive("submit")
    assert (submit.handle, submit.job_id, submit.prompt_token_ids) == (job.handle, "a", [7, 8])
    await session.tokens(job.handle, 0, [1], STOP)
    assert await follower.follow(job) == [1]


async def test_a_lost_job_with_tokens_is_not_begun_again(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    """Its client has seen text that a second run need not repeat."""
    session = await scheduler.session()
    follower, job = await started(client, session, 1)
    session.end()
    session = await scheduler.session()
    await session.receive("attach")
    await session.reject(job.handle, NOT_FOUND)
    assert await follower.follow(job) == [1]
    assert "lost with the scheduler" in str(job.failure)
    await assert_serves(client, session)


async def test_a_gap_ends_the_job(scheduler: ScriptedScheduler, client: SchedulerClient) -> None:
    session = await scheduler.session()
    follower, job = await started(client, session, 1)
    await session.tokens(job.handle, 2, [3])
    assert await follower.follow(job) == [1]
    assert "tokens of the answer were lost" in str(job.failure)
    assert (await session.receive("cancel")).handles == [job.handle]
    await assert_serves(client, session)


async def test_refusal(scheduler: ScriptedScheduler, client: SchedulerClient) -> None:
    session = await scheduler.session()
    submitting = Follower(client).submit("a")
    handle = (await session.receive("submit")).handle
    reason = scheduler_pb2.REJECT_REASON_QUEUE_FULL
    await session.reject(handle, reason, message="the queue is full", retry_after_s=3)
    with pytest.raises(JobRefusedError, match="the queue is full") as refusal:
        await submitting
    assert (refusal.value.reason, refusal.value.retry_after_s) == (reason, 3)
    await assert_serves(client, session)


async def test_attach_to_a_job_of_another_gateway(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    follower = Follower(client)
    attaching = follower.attach("theirs")
    attach = await session.receive("attach")
    assert (attach.job_id, attach.next_index) == ("theirs", 0)
    await session.accept(attach.handle)
    job = await attaching
    await session.tokens(attach.handle, 0, [1, 2])
    await follower.follow(job, 2)
    session.end()
    session = await scheduler.session()
    assert (await session.receive("attach")).next_index == 2
    await session.tokens(attach.handle, 2, [3], STOP)
    assert await follower.follow(job) == [1, 2, 3]


async def test_attach_to_a_job_that_is_not_there(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    attaching = Follower(client).attach("nobody's")
    await session.reject((await session.receive("attach")).handle, NOT_FOUND)
    with pytest.raises(JobRefusedError) as refusal:
        await attaching
    assert refusal.value.reason == NOT_FOUND
    await assert_serves(client, session)
