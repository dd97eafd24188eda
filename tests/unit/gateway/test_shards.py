"""Which shard gets an answer, and which one has it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import pytest

from fastserve.gateway.answer_ids import new_answer_id, shard_of
from fastserve.gateway.jobs import SchedulerLostError
from fastserve.gateway.scheduler_client import SchedulerClient
from fastserve.gateway.shards import Shards
from support.waiting import eventually
from unit.gateway.scripted_scheduler import (
    ScriptedScheduler,
    Session,
    running_scheduler,
    started,
)

Peers = dict[str, tuple[SchedulerClient, Session]]


@contextlib.asynccontextmanager
async def connected(*names: str) -> AsyncIterator[tuple[Shards, Peers]]:
    """Shards that have said Welcome: 10 rows, nothing to do."""
    async with contextlib.AsyncExitStack() as stack:
        clients, sessions = [], {}
        for name in names:
            scheduler: ScriptedScheduler = await stack.enter_async_context(running_scheduler())
            client = SchedulerClient(
                name, [scheduler.address], "g", answer_timeout_s=5, reattach_timeout_s=5
            )
            clients.append(client)
            sessions[name] = scheduler
        shards = Shards(clients)
        stack.enter_context(_background(shards))
        peers = {}
        for client in clients:
            session, _ = await sessions[client.shard].called()
            await session.welcome(shard=client.shard, ready=True, model="m", max_num_seqs=10)
            peers[client.shard] = client, session
        await eventually(lambda: all(client.connected for client in clients))
        yield shards, peers


@contextlib.contextmanager
def _background(shards: Shards) -> Iterator[None]:
    task = asyncio.ensure_future(shards.run())
    try:
        yield
    finally:
        task.cancel()


async def tell(peer: tuple[SchedulerClient, Session], **fields: object) -> None:
    """Another Welcome, and wait until it is here."""
    client, session = peer
    values = {"shard": client.shard, "ready": True, "model": "m", "max_num_seqs": 10, **fields}
    before = client.welcome
    await session.welcome(**values)
    await eventually(lambda: client.welcome is not before)


def chosen(shards: Shards, answers: int, jobs: int = 1) -> Counter[str]:
    return Counter(shards.choose(jobs).shard for _ in range(answers))


async def test_equal_shards_get_equal_shares() -> None:
    async with connected("a", "b", "c") as (shards, _):
        assert chosen(shards, 30) == {"a": 10, "b": 10, "c": 10}


async def test_jobs_of_other_gateways_count() -> None:
    async with connected("a", "b") as (shards, peers):
        await tell(peers["a"], live_jobs=6)
        assert chosen(shards, 6) == {"b": 6}
        assert chosen(shards, 4) == {"a": 2, "b": 2}


async def test_a_large_shard_gets_more() -> None:
    async with connected("small", "large") as (shards, peers):
        await tell(peers["large"], max_num_seqs=30)
        assert chosen(shards, 40) == {"small": 10, "large": 30}


async def test_an_answer_counts_with_all_its_jobs() -> None:
    async with connected("a", "b") as (shards, _):
        first = shards.choose(10).shard
        assert chosen(shards, 10) == {"b" if first == "a" else "a": 10}


async def test_own_jobs_count_until_they_end() -> None:
    async with connected("a", "b") as (_, peers):
        client, session = peers["a"]
        client.expect(1)
        _, job = await started(client, session)
        assert client.load == 0.1  # submitted, and so no longer expected
        await tell(peers["a"], live_jobs=1)
        assert client.load == 0.1
        client.cancel(job)
        assert client.load == 0.0


async def test_shards_without_a_worker_or_a_stream_come_last() -> None:
    async with connected("a", "b") as (shards, peers):
        await tell(peers["a"], ready=False)
        assert chosen(shards, 20) == {"b": 20}
        await tell(peers["b"], ready=False)
        assert shards.connected and not shards.ready
        peers["b"][1].end()
        await eventually(lambda: not peers["b"][0].connected)
        assert chosen(shards, 20) == {"a": 20}


async def test_a_shard_with_another_model_is_not_used() -> None:
    async with connected("a", "b") as (shards, peers):
        await tell(peers["b"], model="other")
        assert shards.model == "m"
        assert chosen(shards, 20) == {"a": 20}


async def test_the_smallest_limit_holds_for_all() -> None:
    async with connected("a", "b") as (shards, peers):
        assert shards.max_job_tokens == 0
        await tell(peers["a"], max_job_tokens=200)
        assert shards.max_job_tokens == 200
        await tell(peers["b"], max_job_tokens=100)
        assert shards.max_job_tokens == 100


async def test_the_id_of_an_answer_finds_its_shard() -> None:
    async with connected("a", "b.1-x") as (shards, _):
        for name in ("a", "b.1-x"):
            client = shards.of(new_answer_id("chatcmpl", name))
            assert client is not None and client.shard == name
        assert shards.of(new_answer_id("chatcmpl", "c")) is None
        assert shards.of("chatcmpl-a") is None


@pytest.mark.parametrize("text", ["", "chatcmpl", "cmpl-" + 32 * "0", "cmpl-" + 32 * "g" + "-a"])
def test_what_is_no_id_of_an_answer(text: str) -> None:
    assert shard_of(text) is None


async def test_a_scheduler_of_another_shard_is_not_used() -> None:
    async with running_scheduler() as scheduler:
        client = SchedulerClient(
            "a", [scheduler.address], "g", answer_timeout_s=0.3, reattach_timeout_s=5
        )
        shards = Shards([client])
        with _background(shards):
            session, _ = await scheduler.called()
            await session.welcome(shard="b", ready=True)
            await scheduler.called()  # it tries again
            assert not shards.connected
            with pytest.raises(SchedulerLostError):
                await shards.known()
