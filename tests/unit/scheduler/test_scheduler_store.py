"""The Lua scripts and their client, against a real Valkey."""

from __future__ import annotations

import asyncio
import dataclasses
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import exceptions
from redis.asyncio import Redis

from fastserve.common.errors import StartupError
from fastserve.proto.v1.sampling_pb2 import SamplingParams
from fastserve.scheduler.store import Held, Store
from fastserve.scheduler.store_errors import (
    ADVICE,
    FencedError,
    StoreLost,
    StoreUnreachable,
    Trouble,
    store_error,
)
from fastserve.scheduler.stored import Batch, Placement, StoredJob
from support.valkey import Valkey, running_valkey

TTL = 60.0


def job(job_id: str, **changes: Any) -> StoredJob:
    base = StoredJob(
        job_id=job_id,
        tenant="acme",
        tenant_weight=0.1,
        service_class="default",
        priority=-2,
        arrival_unix_s=1_750_000_000.25,
        deadline_unix_s=0.0,
        min_output_tokens=4,
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        prompt=[5, 6, 7],
        sampling=SamplingParams(temperature=0.7, seed=2**64 - 1, max_tokens=9, logprobs=0),
        level=1,
        order=3,
        attained_s=0.125,
        preemptions=2,
        state="queued",
        output=[],
    )
    return dataclasses.replace(base, **changes)


class Writer:
    """Numbers writes like the journal does."""

    def __init__(self, store: Store, epoch: int) -> None:
        self.store = store
        self.epoch = epoch
        self.seq = 0

    async def write(self, batch: Batch, *, resync: bool = False, keep_s: int = 30) -> None:
        self.seq += 1
        await self.store.write(self.epoch, self.seq, batch, time.time(), keep_s, resync=resync)


@pytest.fixture
async def writer(store: Store) -> Writer:
    epoch = await store.acquire("me", TTL)
    assert isinstance(epoch, int)
    return Writer(store, epoch)


async def test_a_job_comes_back_as_it_was_written(writer: Writer) -> None:
    wanted = job("a", output=[1, 2], deadline_unix_s=1_750_000_009.5)
    await writer.write(Batch(whole=[wanted]))
    assert await writer.store.load() == [wanted]


text = st.text(st.characters(codec="utf-8"), max_size=20)
token_lists = st.lists(st.integers(0, 2**32 - 1), max_size=20)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    text,
    text,
    st.integers(-(2**31), 2**31 - 1),
    token_lists,
    token_lists,
    st.floats(0, 1e9),
    st.floats(-1e9, 1e9).map(lambda value: struct.unpack("f", struct.pack("f", value))[0]),
)
async def test_any_values_survive(
    writer: Writer,
    tenant: str,
    error: str,
    priority: int,
    prompt: list[int],
    output: list[int],
    seconds: float,
    temperature: float,
) -> None:
    sampling = SamplingParams(
        temperature=temperature, max_tokens=3, logit_bias_values=[temperature]
    )
    wanted = job(
        "a", tenant=tenant, error=error, priority=priority, prompt=prompt, output=output,
        attained_s=seconds, arrival_unix_s=seconds, sampling=sampling,
    )  # fmt: skip
    await writer.write(Batch(whole=[wanted]))
    assert await writer.store.load() == [wanted]


async def test_an_iteration_in_one_call(writer: Writer, redis: Redis) -> None:
    await writer.write(Batch(whole=[job("a", level=0), job("b", level=0), job("c", level=2)]))
    await writer.write(
        Batch(
            whole=[job("d", level=0, order=9)],
            appended=[("a", [10, 11]), ("b", [20])],
            placed=[Placement("b", 3, 17, 1.5, 4, "preempted")],
            ended=[("c", "cancelled", "CANCELLED", "")],
            workers={"w0": '{"connected": true}'},
        )
    )
    await writer.write(Batch(appended=[("a", [12]), ("b", [21])]))
    jobs = {item.job_id: item for item in await writer.store.load()}
    assert list(jobs) == ["a", "d", "b", "c"]  # by level and order, ended ones last
    assert jobs["a"].output == [10, 11, 12]
    assert jobs["b"].output == [20, 21]
    assert (jobs["b"].level, jobs["b"].order, jobs["b"].state) == (3, 17, "preempted")
    assert (jobs["b"].attained_s, jobs["b"].preemptions) == (1.5, 4)
    assert (jobs["c"].state, jobs["c"].finish_reason) == ("cancelled", "CANCELLED")
    assert await redis.zrange("fastserve:{s}:level:0", 0, -1) == ["a", "d"]
    assert await redis.exists("fastserve:{s}:level:2") == 0
    assert await redis.get("fastserve:{s}:log:a") == "10,11,12,"
    assert await redis.hgetall("fastserve:{s}:workers") == {"w0": '{"connected": true}'}
    assert await redis.hget("fastserve:{s}:job:a", "prompt") == "5,6,7,"


async def test_ended_jobs_expire_and_leave_the_index(writer: Writer, redis: Redis) -> None:
    await writer.write(Batch(whole=[job("a")], ended=[("a", "finished", "STOP", "")]), keep_s=30)
    assert 0 < await redis.ttl("fastserve:{s}:job:a") <= 30
    assert 0 < await redis.ttl("fastserve:{s}:log:a") <= 30
    await redis.zadd("fastserve:{s}:finished", {"long-gone": time.time() - 1})
    await writer.write(Batch(whole=[job("b")], ended=[("b", "failed", "FAILED", "it broke")]))
    assert await writer.store.job_ids() == ["a", "b"]
    await redis.delete("fastserve:{s}:job:a")
    assert [item.error for item in await writer.store.load()] == ["it broke"]


async def test_forgotten_jobs_leave_nothing(writer: Writer, redis: Redis) -> None:
    await writer.write(Batch(whole=[job("a", output=[1]), job("b")]))
    await writer.write(Batch(ended=[("b", "finished", "STOP", "")]))
    await writer.write(Batch(forgotten=["a", "b", "never-there"]))
    left = set(await redis.keys("*"))
    assert left == {f"fastserve:{{s}}:{name}" for name in ("epoch", "lease", "seq")}


async def test_a_whole_job_replaces_what_was_there(writer: Writer, redis: Redis) -> None:
    await writer.write(Batch(whole=[job("a", level=4, output=[1, 2, 3])]))
    wanted = job("a", level=2, output=[1])
    await writer.write(Batch(whole=[wanted]), resync=True)
    assert await writer.store.load() == [wanted]
    assert await redis.exists("fastserve:{s}:level:4") == 0


async def test_keys_of_a_shard_share_their_slot_and_no_other_shard_sees_them(
    writer: Writer, redis: Redis, shared_valkey: Valkey
) -> None:
    await writer.write(Batch(whole=[job("a{b}c")]))
    assert len(await redis.keys("fastserve:{s}:*")) == await redis.dbsize()
    other = Store(shared_valkey.url, "t", timeout_s=2.0)
    assert await other.load() == []
    assert isinstance(await other.acquire("me", TTL), int)
    await other.close()


# Fencing and order of writes


async def test_only_one_holds_the_lease(store: Store) -> None:
    first = await store.acquire("me", TTL)
    assert isinstance(first, int)
    held = await store.acquire("you", TTL)
    assert isinstance(held, Held)
    assert held.owner == "me"
    assert 0 < held.remaining_s <= TTL
    await store.release(first)
    second = await store.acquire("you", TTL)
    assert isinstance(second, int)
    assert second > first


async def test_a_stale_epoch_is_refused(store: Store, writer: Writer) -> None:
    await writer.write(Batch(whole=[job("a")]))
    await store.release(writer.epoch)
    successor = await store.acquire("you", TTL)
    assert isinstance(successor, int)
    with pytest.raises(FencedError, match=f"epoch {successor}"):
        await writer.write(Batch(appended=[("a", [1])]))
    with pytest.raises(FencedError):
        await writer.write(Batch(whole=[job("b")]), resync=True)
    with pytest.raises(FencedError):
        await store.renew(writer.epoch, "me", TTL)
    await store.release(writer.epoch)  # not ours: stays
    assert isinstance(await store.acquire("third", TTL), Held)
    assert await store.load() == [job("a")]


async def test_a_lapsed_lease_is_taken_up_again_unless_another_had_it(store: Store) -> None:
    epoch = await store.acquire("me", 0.05)
    assert isinstance(epoch, int)
    await asyncio.sleep(0.1)
    assert await store.renew(epoch, "me", TTL) == 0
    assert isinstance(await store.acquire("you", TTL), Held)


async def test_a_late_write_is_left_out(store: Store, writer: Writer) -> None:
    await writer.write(Batch(whole=[job("a")]))
    writer.seq += 1  # a write that was given up after a time-out
    await writer.write(Batch(whole=[job("a", output=[1])]), resync=True)
    with pytest.raises(StoreLost, match="older"):
        late = Batch(appended=[("a", [1])])
        await store.write(writer.epoch, writer.seq - 1, late, time.time(), 30, resync=False)
    assert (await store.load())[0].output == [1]


async def test_a_gap_before_a_write_is_noticed(writer: Writer) -> None:
    await writer.write(Batch(whole=[job("a")]))
    writer.seq += 1
    with pytest.raises(StoreLost, match="write 1"):
        await writer.write(Batch(appended=[("a", [1])]))


async def test_a_redis_that_came_back_empty_is_noticed_and_told(
    store: Store, writer: Writer, redis: Redis
) -> None:
    await writer.write(Batch(whole=[job("a")]))
    assert await store.renew(writer.epoch, "me", TTL) == 1
    await redis.flushall()
    with pytest.raises(StoreLost, match="epoch 0"):
        await writer.write(Batch(appended=[("a", [1])]))
    assert await store.renew(writer.epoch, "me", TTL) == -1
    await writer.write(Batch(whole=[job("a", output=[1])]), resync=True)
    assert (await store.load())[0].output == [1]


async def test_epochs_grow_even_if_redis_forgot_them(store: Store, redis: Redis) -> None:
    first = await store.acquire("me", TTL)
    await redis.flushall()
    await asyncio.sleep(1.1)  # epochs start at the unix second
    second = await store.acquire("me", TTL)
    assert isinstance(first, int) and isinstance(second, int)
    assert second > first


async def test_every_sampling_parameter_comes_back(writer: Writer) -> None:
    sampling = SamplingParams(
        temperature=0.7,
        top_p=0.95,
        top_k=5,
        min_p=0.01,
        presence_penalty=-1.5,
        frequency_penalty=0.1,
        repetition_penalty=1.1,
        logit_bias_ids=[1, 2],
        logit_bias_values=[-100.0, 0.3],
        seed=2**63 + 1,
        logprobs=3,
        max_tokens=100,
        min_tokens=2,
        stop_token_ids=[7, 8],
        ignore_eos=True,
    )
    assert {field.name for field, _ in sampling.ListFields()} == {
        field.name for field in SamplingParams.DESCRIPTOR.fields
    }
    wanted = [job("all", sampling=sampling), job("none", order=4, sampling=SamplingParams())]
    await writer.write(Batch(whole=wanted))
    assert await writer.store.load() == wanted


# Failures


async def test_an_unreadable_job_does_not_stop_the_others(writer: Writer, redis: Redis) -> None:
    await writer.write(Batch(whole=[job("a"), job("b"), job("c")]))
    await redis.hdel("fastserve:{s}:job:a", "sampling")
    await redis.set("fastserve:{s}:log:b", "1,two,")
    assert await writer.store.load() == [job("c")]


async def test_cancelling_a_call_is_never_lost(writer: Writer) -> None:
    async def renew_for_ever() -> None:
        while True:
            await writer.store.renew(writer.epoch, "me", TTL)

    for delay in range(100):
        task = asyncio.ensure_future(renew_for_ever())
        await asyncio.sleep(delay * 1e-4)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=5)
        assert done


async def test_nobody_there(tmp_path: Path) -> None:
    store = Store(f"unix://{tmp_path}/none.sock", "s", timeout_s=0.5)
    with pytest.raises(StoreUnreachable, match=r"none\.sock"):
        await store.ping()
    with pytest.raises(StoreUnreachable):
        await store.load()
    await store.close()


def test_malformed_url_is_refused() -> None:
    with pytest.raises(StartupError, match="redis URL"):
        Store("htp://nowhere", "s", timeout_s=0.5)


async def test_a_frozen_server_costs_no_more_than_the_timeout() -> None:
    with running_valkey() as server:
        store = Store(server.url, "s", timeout_s=0.2)
        epoch = await store.acquire("me", TTL)
        assert isinstance(epoch, int)
        server.pause()
        async with asyncio.timeout(10):
            with pytest.raises(StoreUnreachable):
                await store.write(epoch, 1, Batch(), time.time(), 30, resync=False)
        server.resume()
        await store.close()


async def test_a_full_server_is_an_error_not_a_loss_of_the_old(
    writer: Writer, redis: Redis
) -> None:
    await writer.write(Batch(whole=[job("a")]))
    await redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(StoreUnreachable, match="OutOfMemory") as caught:
            await writer.write(Batch(appended=[("a", [1])]))
        assert caught.value.trouble is Trouble.OUT_OF_MEMORY
    finally:
        await redis.config_set("maxmemory", "0")
    assert await writer.store.load() == [job("a")]


async def test_whether_jobs_may_be_evicted(store: Store, redis: Redis) -> None:
    try:
        assert not await store.evicts()
        await redis.config_set("maxmemory", str(2**30))
        assert not await store.evicts()
        await redis.config_set("maxmemory-policy", "allkeys-lru")
        assert await store.evicts()
    finally:
        await redis.config_set("maxmemory", "0")
        await redis.config_set("maxmemory-policy", "noeviction")


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (exceptions.ConnectionError("refused"), Trouble.UNREACHABLE),
        (exceptions.BusyLoadingError("loading"), Trouble.UNREACHABLE),
        (exceptions.AuthenticationError("wrong"), Trouble.PASSWORD),
        (exceptions.NoPermissionError("no"), Trouble.PASSWORD),
        (exceptions.OutOfMemoryError("full"), Trouble.OUT_OF_MEMORY),
        (exceptions.ReadOnlyError("replica"), Trouble.READ_ONLY),
        (exceptions.ResponseError("WRONGTYPE"), Trouble.REFUSED),
        (exceptions.ResponseError("LOST: epoch 1"), Trouble.LOST_DATA),
        (exceptions.ResponseError("FENCED by epoch 3"), Trouble.FENCED),
    ],
)
def test_what_is_wrong_is_told_apart(error: exceptions.RedisError, trouble: Trouble) -> None:
    assert store_error(error).trouble is trouble
    assert set(ADVICE) == set(Trouble)


def test_an_error_while_connecting_tells_its_cause() -> None:
    wrapped = exceptions.ConnectionError("invalid username-password pair")
    wrapped.__cause__ = exceptions.AuthenticationError("invalid username-password pair")
    assert store_error(wrapped).trouble is Trouble.PASSWORD
