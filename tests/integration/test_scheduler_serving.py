"""The scheduler with a worker and gateways over real gRPC and a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from fastserve.proto.v1 import sampling_pb2, scheduler_pb2, worker_pb2
from support.fake_worker import FakeWorker, expected_tokens, token_at
from support.gateway_client import GatewayClient, connected
from support.schedulers import RunningScheduler, running_scheduler, start_scheduler
from support.valkey import Valkey
from support.waiting import eventually


@pytest.fixture
async def scheduler(valkey: Valkey, worker: FakeWorker) -> AsyncIterator[RunningScheduler]:
    async with running_scheduler(valkey, worker) as running:
        yield running


@pytest.fixture
async def gateway(scheduler: RunningScheduler) -> AsyncIterator[GatewayClient]:
    async with connected(scheduler.address) as client:
        yield client


async def log_of(redis: Redis, job_id: str) -> list[int]:
    """Output tokens of a job as Redis has them."""
    log = str(await redis.get(f"fastserve:{{0}}:log:{job_id}"))
    return [int(token) for token in log.split(",")[:-1]]


async def test_tokens_come_in_order_and_end(gateway: GatewayClient) -> None:
    views = [
        await gateway.submit(f"job-{number}", seed=number, prompt=3 + 9 * number, max_tokens=20)
        for number in range(12)
    ]
    for number, view in enumerate(views):
        await (await view.accepted()).finished()
        assert view.tokens == expected_tokens(number, 20)
        assert view.finish == sampling_pb2.FINISH_REASON_LENGTH


async def test_tokens_of_an_iteration_travel_together(
    gateway: GatewayClient, worker: FakeWorker
) -> None:
    worker.gate.close()
    views = [await gateway.submit(f"job-{number}", max_tokens=3) for number in range(4)]
    for view in views:
        await view.accepted()
    worker.gate.open()
    for view in views:
        await view.finished()
    assert max(len(batch.handles) for batch in gateway.batches) == 4
    assert len(gateway.batches) < 12


async def test_a_stop_token_ends_a_job(gateway: GatewayClient) -> None:
    stop = {"stop_token_ids": [token_at(5, 3)]}
    view = await gateway.submit("a", seed=5, max_tokens=50, sampling=stop)
    await view.finished()
    assert view.tokens == expected_tokens(5, 4)
    assert view.finish == sampling_pb2.FINISH_REASON_STOP


async def test_logprobs_pass_through(gateway: GatewayClient) -> None:
    plain = await gateway.submit("plain", seed=1, max_tokens=4)
    scored = await gateway.submit("scored", seed=2, max_tokens=4, sampling={"logprobs": 2})
    await plain.finished()
    await scored.finished()
    assert plain.logprobs == []
    assert scored.logprobs == [0.0, -1.0, -2.0, -3.0]
    assert scored.top_ids == [[token, (token + 1) % 1000] for token in expected_tokens(2, 4)]


async def test_welcome_tells_model_and_limits(gateway: GatewayClient) -> None:
    welcome = gateway.welcome
    assert (welcome.ready, welcome.durable, welcome.model) == (True, True, "fake")
    assert (welcome.max_model_len, welcome.max_job_tokens) == (2048, 2048)
    assert welcome.epoch > 0
    assert (welcome.shard, welcome.max_num_seqs) == ("0", 8)


async def test_welcome_tells_the_load(gateway: GatewayClient, worker: FakeWorker) -> None:
    worker.gate.close()
    views = [await gateway.submit(f"j{number}") for number in range(3)]
    await eventually(lambda: gateway.welcome.live_jobs == 3)
    worker.gate.open()
    for view in views:
        await view.finished()
    await eventually(lambda: gateway.welcome.live_jobs == 0)


# Durability


async def test_no_token_leaves_before_it_is_in_redis(valkey: Valkey, worker: FakeWorker) -> None:
    async with (
        running_scheduler(valkey, worker, redis_timeout=5.0, leader_ttl=20.0) as scheduler,
        connected(scheduler.address) as gateway,
    ):
        view = await gateway.submit("a", seed=3, max_tokens=200)
        await view.at_least(5)
        valkey.pause()
        # What was written before is on its way: it arrives while the worker goes on.
        for _ in range(2):
            before, ran = len(view.tokens), worker.iterations
            await eventually(lambda ran=ran: worker.iterations > ran + 20, "the worker going on")  # type: ignore[misc]
        assert len(view.tokens) == before
        valkey.resume()
        await view.finished()
        assert view.tokens == expected_tokens(3, 200)


async def test_tokens_seen_are_in_redis(
    gateway: GatewayClient, valkey: Valkey, worker: FakeWorker
) -> None:
    view = await gateway.submit("a", seed=3, max_tokens=200)
    async with Redis.from_url(valkey.url, decode_responses=True) as redis:
        for count in range(1, 100, 7):
            await view.at_least(count)
            seen = len(view.tokens)
            assert len(await log_of(redis, "a")) >= seen


async def test_accepted_means_written(valkey: Valkey, worker: FakeWorker) -> None:
    async with (
        running_scheduler(valkey, worker, redis_timeout=5.0, leader_ttl=20.0) as scheduler,
        connected(scheduler.address) as gateway,
    ):
        valkey.pause()
        view = await gateway.submit("a")
        await asyncio.sleep(0.2)
        assert not view._answered.is_set()
        valkey.resume()
        await (await view.accepted()).finished()


async def test_redis_down_for_two_seconds(
    scheduler: RunningScheduler, gateway: GatewayClient, valkey: Valkey, worker: FakeWorker
) -> None:
    assert scheduler.metric("fastserve_durable") == 1
    worker.gate.close()
    jobs = {
        name: await gateway.submit(name, seed=seed, max_tokens=60)
        for seed, name in enumerate(("old", "older"))
    }
    await worker.gate.step(10)
    await jobs["old"].at_least(5)
    valkey.stop()
    down = time.monotonic()
    await worker.gate.step(10)
    await eventually(lambda: scheduler.metric("fastserve_durable") == 0)
    await eventually(lambda: not gateway.welcome.durable)
    await jobs["old"].at_least(15)  # served from memory
    jobs["fresh"] = await gateway.submit("fresh", seed=2, max_tokens=60)
    await jobs["fresh"].accepted()
    await worker.gate.step(10)
    await jobs["fresh"].at_least(5)
    await asyncio.sleep(max(0.0, 2.0 - (time.monotonic() - down)))
    valkey.start()
    await eventually(lambda: scheduler.metric("fastserve_durable") == 1)
    await eventually(lambda: gateway.welcome.durable)
    async with Redis.from_url(valkey.url, decode_responses=True) as redis:
        for seed, (name, view) in enumerate(jobs.items()):
            tokens = await log_of(redis, name)
            assert len(tokens) >= len(view.tokens) > 0
            assert tokens == expected_tokens(seed, len(tokens))
    worker.gate.open()
    for seed, view in enumerate(jobs.values()):
        await view.finished()
        assert view.tokens == expected_tokens(seed, 60)


# Gateways


async def test_attach_replays_exactly(scheduler: RunningScheduler, gateway: GatewayClient) -> None:
    view = await gateway.submit("a", seed=4, max_tokens=40)
    await view.at_least(10)
    async with connected(scheduler.address, "other") as other:
        taken = await other.attach("a", 7)
        await (await taken.accepted()).finished()
        assert taken.tokens == expected_tokens(4, 40)[7:]
        ended = await other.attach("a", 0)  # over, but still there
        await ended.finished()
        assert ended.tokens == expected_tokens(4, 40)
        assert ended.finish == sampling_pb2.FINISH_REASON_LENGTH
        unknown = await other.attach("never-there")
        assert (await unknown.refused()).reason == scheduler_pb2.REJECT_REASON_NOT_FOUND


async def test_another_gateway_takes_over_from_a_dead_one(
    scheduler: RunningScheduler, worker: FakeWorker
) -> None:
    async with connected(scheduler.address, "first") as first:
        view = await first.submit("a", seed=6, max_tokens=100)
        await view.at_least(4)
        first.die()
    seen = list(view.tokens)
    async with connected(scheduler.address, "second") as second:
        rest = await second.attach("a", len(seen))
        await rest.finished()
    assert seen + rest.tokens == expected_tokens(6, 100)


async def test_jobs_nobody_comes_for_are_cancelled(valkey: Valkey, worker: FakeWorker) -> None:
    worker.gate.close()
    async with running_scheduler(valkey, worker, grace=0.3) as scheduler:
        async with connected(scheduler.address) as gateway:
            await (await gateway.submit("a", max_tokens=200)).accepted()
        await eventually(lambda: scheduler.metric("fastserve_requests_total", outcome="cancelled"))
        worker.gate.open()
        await eventually(lambda: worker.held == {}, "release at the worker")
        # And forgotten after another grace.
        leader = scheduler.service.leader
        assert leader is not None
        await eventually(lambda: "a" not in leader.jobs)


async def test_a_slow_gateway_blocks_nobody(
    scheduler: RunningScheduler, gateway: GatewayClient
) -> None:
    async with connected(scheduler.address, "slow") as slow:
        # Far more bytes than the stream takes without being read.
        stuck = await slow.submit("stuck", seed=1, max_tokens=1000, sampling={"logprobs": 200})
        await stuck.at_least(1)
        slow.reading.clear()
        views = [
            await gateway.submit(f"j{number}", seed=number, max_tokens=150) for number in range(3)
        ]
        for number, view in enumerate(views):
            await view.finished()
            assert view.tokens == expected_tokens(number, 150)
        slow.reading.set()
        await stuck.finished()
        assert stuck.tokens == expected_tokens(1, 1000)
        assert len(stuck.logprobs) == 1000


async def test_cancel_reaches_the_worker_within_an_iteration(
    gateway: GatewayClient, worker: FakeWorker
) -> None:
    view = await gateway.submit("a", seed=2, max_tokens=200)
    await view.at_least(3)
    worker.gate.close()
    ran = worker.iterations
    await gateway.cancel(view)
    await view.finished()
    assert view.finish == sampling_pb2.FINISH_REASON_CANCELLED
    seen = len(view.tokens)
    # The gateway may hear of the end before the worker does.
    release = worker_pb2.KV_OP_RELEASE
    await eventually(lambda: any(release in plan.ops for plan in worker.plans), "its release")
    worker.gate.open()
    await eventually(lambda: worker.held == {}, "release at the worker")
    assert worker.iterations <= ran + 1  # the one that was under way
    assert view.tokens == expected_tokens(2, seen)


async def test_refusals(scheduler: RunningScheduler, gateway: GatewayClient) -> None:
    running = await gateway.submit("a", max_tokens=200)
    await running.accepted()
    cases = [
        (await gateway.submit("a"), scheduler_pb2.REJECT_REASON_ALREADY_EXISTS),
        (await gateway.submit("b", max_tokens=3000), scheduler_pb2.REJECT_REASON_TOO_LONG),
        (await gateway.submit("c", prompt=0), scheduler_pb2.REJECT_REASON_INVALID),
        (await gateway.submit("d", max_tokens=0), scheduler_pb2.REJECT_REASON_INVALID),
    ]
    for view, reason in cases:
        refused = await view.refused()
        assert refused.reason == reason
        assert refused.message
    await running.finished()
    assert scheduler.metric("fastserve_incoming_requests_total") == 5
    assert scheduler.metric("fastserve_requests_total", outcome="rejected_invalid") == 2
    assert scheduler.metric("fastserve_requests_total", outcome="length") == 1


async def test_the_queue_limit(valkey: Valkey, worker: FakeWorker) -> None:
    worker.gate.close()
    async with (
        running_scheduler(valkey, worker, max_num_queued_reqs=5, max_num_seqs=2) as scheduler,
        connected(scheduler.address) as gateway,
    ):
        views = [await gateway.submit(f"j{number}", seed=number) for number in range(30)]
        answers = [await view.answered() for view in views]
        refused = [view for view in answers if view.rejected is not None]
        accepted = [view for view in answers if view.rejected is None]
        assert 5 <= len(accepted) <= 8
        for view in refused:
            assert view.rejected is not None
            assert view.rejected.reason == scheduler_pb2.REJECT_REASON_QUEUE_FULL
            assert view.rejected.retry_after_s >= 1
        worker.gate.open()
        for view in accepted:
            await view.finished()
        again = await gateway.submit("again")
        await (await again.accepted()).finished()


async def test_a_worker_that_comes_later_makes_it_ready(valkey: Valkey, tmp_path: Path) -> None:
    late, address = FakeWorker(), f"unix:{tmp_path}/late"
    scheduler = await start_scheduler(valkey, address)
    await scheduler.leading()
    async with connected(scheduler.address) as gateway:
        assert not gateway.welcome.ready
        refused = await (await gateway.submit("early")).refused()
        assert refused.reason == scheduler_pb2.REJECT_REASON_NO_WORKER
        async with late.serving(address):
            await eventually(lambda: gateway.welcome.ready)
            await (await gateway.submit("a")).finished()
        await eventually(lambda: not gateway.welcome.ready)
    await scheduler.stop()


async def test_a_deadline_ends_a_job(gateway: GatewayClient, worker: FakeWorker) -> None:
    worker.gate.close()
    view = await gateway.submit("a", deadline_unix_s=time.time() + 1.0)
    await view.finished()
    assert view.finish == sampling_pb2.FINISH_REASON_DEADLINE
    assert view.error
    worker.gate.open()


async def test_a_job_that_fails_in_the_worker_disturbs_no_other(
    gateway: GatewayClient, worker: FakeWorker
) -> None:
    worker.gate.close()
    broken = await gateway.submit("broken", max_tokens=20)
    sound = await gateway.submit("sound", seed=8, max_tokens=20)
    await broken.accepted()
    await sound.accepted()
    worker.fail_next["broken"] = "not a number"
    worker.gate.open()
    await broken.finished()
    assert (broken.finish, broken.error) == (sampling_pb2.FINISH_REASON_FAILED, "not a number")
    await sound.finished()
    assert sound.tokens == expected_tokens(8, 20)


async def test_snapshot(
    scheduler: RunningScheduler, gateway: GatewayClient, worker: FakeWorker
) -> None:
    worker.gate.close()
    view = await gateway.submit("a", tenant="acme", prompt=7)
    await view.accepted()
    snapshot = await scheduler.snapshot()
    assert snapshot.epoch == gateway.welcome.epoch
    assert (snapshot.policy, snapshot.durable) == ("fastserve", True)
    assert snapshot.shard == "0"
    (state,) = snapshot.workers
    assert (state.worker_id, state.connected, state.device_blocks) == ("w0", True, 512)
    (job,) = snapshot.jobs
    assert (job.job_id, job.tenant, job.prompt_tokens, job.output_tokens) == ("a", "acme", 7, 0)
    assert len(snapshot.level_depths) == len(snapshot.level_quanta_s)
    worker.gate.open()
    await view.finished()
    after = await scheduler.snapshot()
    assert not after.jobs
    (state,) = after.workers
    # 7 tokens of prompt, and each sampled token but the last is processed.
    assert state.processed_tokens == 7 + state.sampled_tokens - 1
    assert state.sampled_tokens == len(view.tokens) and state.iteration_s > 0
