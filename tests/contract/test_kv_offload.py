"""Every call of the kv-offload contract, and every refusal, against the real process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from fastserve.common.rpc import channel
from fastserve.proto.v1 import kv_offload_pb2 as pb
from fastserve.proto.v1 import kv_offload_pb2_grpc as pb_grpc
from support.kv_client import Caller, Stub, attach, refused
from support.processes import Running, service


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Running]:
    flags = ["--listen", f"unix:{tmp_path}/s", "--host-blocks", "4", "--pool-dir", str(tmp_path)]
    with service("fastserve.kv_offload", tmp_path, *flags) as running:
        yield running


@pytest.fixture
async def stub(sidecar: Running) -> AsyncIterator[pb_grpc.KvOffloadServiceAsyncStub]:
    async with channel(sidecar.info["address"]) as connection:
        yield pb_grpc.KvOffloadServiceStub(connection)


async def test_a_block_goes_out_and_comes_back(stub: Stub, sidecar: Running) -> None:
    attached = await stub.Attach(attach())
    assert (attached.slots, attached.slot_bytes) == (4, 8192)
    assert Path(attached.pool_path).stat().st_size == attached.pool_bytes == 4 * 8192
    caller = Caller(stub, attached)
    slots = await caller.reserve("a", 0, 1)
    assert not (await caller.lookup("a")).job_ids
    await caller.commit("a", slots, [16, 7])
    found = await caller.lookup("a")
    assert list(found.job_ids) == ["a"]
    assert list(found.block_indexes) == [0, 1]
    assert list(found.slots) == slots
    assert list(found.valid_tokens) == [16, 7]
    assert list(found.checksums) == [2**64 - 1] * 2
    assert list(found.on_disk) == [0, 0]
    [piece] = await caller.read("a", 0, 1)
    assert (list(piece.block_indexes), list(piece.slots)) == ([0, 1], slots)
    assert (list(piece.valid_tokens), list(piece.checksums)) == ([16, 7], [2**64 - 1] * 2)
    stats = await stub.Stats(pb.StatsRequest())
    assert (stats.committed_slots, stats.free_slots, stats.jobs) == (2, 2, 1)
    assert stats.committed_bytes_total == stats.looked_up_bytes_total == 2 * 5000
    metrics = sidecar.metrics()
    for direction in ("in", "out"):
        labels = f'{{direction="{direction}",tier="host"}}'
        assert metrics[f"fastserve_kv_tier_bytes_total{labels}"] == 10000
        assert metrics[f"fastserve_kv_tier_seconds_total{labels}"] > 0
    assert metrics["fastserve_host_kv_usage_ratio"] == 0.5
    assert metrics['fastserve_host_kv_slots{state="committed"}'] == 2
    assert metrics['fastserve_kv_lookups_total{result="host"}'] == 2
    released = await stub.Release(pb.ReleaseRequest(job_ids=["a", "unknown"], **caller.who))
    assert (released.freed_slots, released.free_slots) == (2, 4)


async def test_the_prefix_cache_lives_in_room_that_nobody_needs(
    stub: Stub, sidecar: Running
) -> None:
    caller = Caller(stub, await stub.Attach(attach()))

    async def save(*keys: bytes) -> int:
        fill = pb.ReserveRequest(cache_blocks=len(keys), **caller.who)
        slots = list((await stub.Reserve(fill)).slots)
        for slot, key in zip(slots, keys, strict=False):
            caller.overwrite(slot, key * 100)
        commit = pb.CommitRequest(
            slots=slots, keys=keys[: len(slots)], checksums=[7] * len(slots), **caller.who
        )
        return (await stub.Commit(commit)).cached_blocks

    async def read(*keys: bytes, damaged: bool = False) -> pb.ReadResponse:
        call = stub.Read()
        await call.write(pb.ReadRequest(keys=keys, **caller.who))
        piece = await call.read()
        if not isinstance(piece, pb.ReadResponse):
            return pb.ReadResponse()
        await call.write(pb.ReadRequest(damaged=damaged))
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        return piece

    assert await save(b"one", b"two", b"") == 2
    piece = await read(b"one", b"two", b"three")
    assert [caller.bytes_of(slot, 3) for slot in piece.slots] == [b"one", b"two"]
    assert (list(piece.checksums), list(piece.valid_tokens)) == ([7, 7], [16, 16])
    assert not (await read(b"three", b"one")).slots
    assert (await caller.stats()).free_slots == 4
    metrics = sidecar.metrics()
    assert metrics['fastserve_host_kv_slots{state="cached"}'] == 2
    assert metrics['fastserve_host_kv_slots{state="free"}'] == 2
    assert metrics["fastserve_host_kv_usage_ratio"] == 0
    # A job takes what it needs; what is left can still be read.
    slots = await caller.reserve("a", 0, 1, 2)
    assert len((await read(b"one", b"two")).slots) == 1
    await caller.commit("a", slots, [16] * 3)
    assert await save(b"four", b"five") == 1
    assert not (await read(b"one")).slots
    assert (await read(b"four", damaged=True)).slots
    assert not (await read(b"four")).slots
    # Nobody else knows the keys, and nobody is to find slots reserved by the dead.
    await caller.release("a")
    assert await save(b"five") == 1
    await stub.Reserve(pb.ReserveRequest(cache_blocks=3, **caller.who))
    await stub.Attach(attach(epoch=2))
    stats = await caller.stats()
    assert (stats.free_slots, stats.cached_blocks, stats.reserved_slots) == (4, 0, 0)


async def test_full_pool_refuses_and_changes_nothing(stub: Stub) -> None:
    caller = Caller(stub, await stub.Attach(attach()))
    await caller.reserve("a", 0, 1, 2)
    await refused(
        caller.reserve("b", 0, 1), grpc.StatusCode.RESOURCE_EXHAUSTED, "2 blocks wanted, room for 1"
    )
    assert (await stub.Stats(pb.StatsRequest())).rejected_reservations_total == 1
    assert len(await caller.reserve("b", 0)) == 1


async def test_wrong_arguments_are_refused_with_a_sentence(stub: Stub) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    await refused(stub.Attach(pb.AttachRequest()), invalid, "must be set")
    caller = Caller(stub, await stub.Attach(attach()))
    await refused(caller.reserve("a"), invalid, "must be set")
    await refused(caller.reserve("a", 1, 1), invalid, "named twice")
    await refused(caller.commit("a", [3], [16]), invalid, "slot 3 is not reserved for job a")


async def test_calls_of_a_past_life_are_refused(stub: Stub) -> None:
    stale = grpc.StatusCode.FAILED_PRECONDITION
    old = Caller(stub, await stub.Attach(attach(epoch=1)), epoch=1)
    slots = await old.reserve("a", 0)
    await old.commit("a", slots, [16])
    await old.reserve("a", 1)
    new = Caller(stub, await stub.Attach(attach(epoch=2)), epoch=2)
    await refused(old.reserve("b", 0), stale, "another life of this worker")
    await refused(stub.Attach(attach(epoch=1)), stale, "a later life")
    found = await new.lookup()
    assert list(found.block_counts) == [1]  # committed stays, reserved is gone
    stats = await stub.Stats(pb.StatsRequest())
    assert (stats.reserved_slots, stats.free_slots) == (0, 3)
    assert stats.looked_up_bytes_total == 0  # taking stock is not reading


async def test_another_layout_empties_the_pool(stub: Stub) -> None:
    old = Caller(stub, await stub.Attach(attach()))
    await old.commit("a", await old.reserve("a", 0), [16])
    new = Caller(stub, await stub.Attach(attach(layout="other")))
    await refused(old.lookup("a"), grpc.StatusCode.FAILED_PRECONDITION, "attach again")
    assert not (await new.lookup()).job_ids


async def test_block_larger_than_the_pool_memory_is_refused(tmp_path: Path) -> None:
    flags = ["--listen", f"unix:{tmp_path}/s", "--host-memory", "4K", "--pool-dir", str(tmp_path)]
    with service("fastserve.kv_offload", tmp_path, *flags) as running:
        async with channel(running.info["address"]) as connection:
            await refused(
                pb_grpc.KvOffloadServiceStub(connection).Attach(attach()),
                grpc.StatusCode.INVALID_ARGUMENT,
                "does not fit into --host-memory 4K",
            )


async def test_the_pool_file_is_gone_after_a_clean_stop_and_after_a_restart(tmp_path: Path) -> None:
    flags = ["--listen", f"unix:{tmp_path}/s", "--host-blocks", "1", "--pool-dir", str(tmp_path)]
    with service("fastserve.kv_offload", tmp_path, *flags) as running:
        async with channel(running.info["address"]) as connection:
            await pb_grpc.KvOffloadServiceStub(connection).Attach(attach())
        running.kill()
    assert len(list(tmp_path.glob("fastserve-kv-*"))) == 1
    with service("fastserve.kv_offload", tmp_path, *flags):
        assert not list(tmp_path.glob("fastserve-kv-*"))
