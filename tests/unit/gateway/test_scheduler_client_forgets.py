"""Jobs that are over for this gateway are no news for the next stream."""

from __future__ import annotations

from fastserve.gateway.scheduler_client import SchedulerClient
from unit.gateway.scripted_scheduler import (
    STOP,
    Follower,
    ScriptedScheduler,
    assert_serves,
    started,
)


async def test_job_that_is_detached_without_a_stream(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    """Its grace is the scheduler's business: a Cancel would take it from whoever follows it."""
    session = await scheduler.session()
    _, left = await started(client, session, 1)
    session.end()
    session, _ = await scheduler.called()
    client.detach(left, 60)
    follower = Follower(client)
    attaching = follower.attach("a")
    await session.welcome(ready=True)
    attach = await session.receive("attach")
    assert attach.handle != left.handle
    assert attach.next_index == 0
    await session.tokens(attach.handle, 0, [1, 2], STOP)
    assert await follower.follow(await attaching) == [1, 2]
    await assert_serves(client, session)


async def test_job_that_ends_with_a_gap(
    scheduler: ScriptedScheduler, client: SchedulerClient
) -> None:
    session = await scheduler.session()
    follower, job = await started(client, session, 1)
    await session.tokens(job.handle, 2, [3], STOP)
    assert await follower.follow(job) == [1]
    assert "tokens of the answer were lost" in str(job.failure)
    session.end()
    await assert_serves(client, await scheduler.session())
