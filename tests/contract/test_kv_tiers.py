"""The real sidecar with a disk behind its pool: blocks go there and come back, and whatever breaks
costs a job its copy, never its correctness."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from fastserve.proto.v1 import kv_offload_pb2 as pb
from support.kv_client import BLOCK_BYTES, Caller, attached, refused, scratch
from support.processes import Running, service

HOST, DISK = 8, 12  # slots
CAPACITY = HOST + DISK - 1
SLOT = 8192
LOST = grpc.StatusCode.DATA_LOSS
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
STALE = grpc.StatusCode.FAILED_PRECONDITION


def start(
    folder: Path, *flags: str, disk_bytes: int = DISK * SLOT, host: int = HOST
) -> contextlib.AbstractContextManager[Running]:
    base = ["--listen", f"unix:{folder}/s", "--host-blocks", str(host), "--pool-dir", str(folder)]
    disk = ["--disk-path", str(folder), "--disk-size", str(disk_bytes)]
    return service("fastserve.kv_offload", folder, *base, *disk, *flags)


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Running]:
    with start(tmp_path) as running:
        yield running


def disk_file(folder: Path) -> Path:
    (path,) = folder.glob("fastserve-kvdisk-*")
    return path


async def on_disk(caller: Caller, job: str) -> list[int]:
    """Indexes of a job's blocks that are on the disk."""
    found = await caller.lookup(job)
    return [i for i, away in zip(found.block_indexes, found.on_disk, strict=True) if away]


async def test_what_does_not_fit_the_host_goes_to_the_disk_and_comes_back(sidecar: Running) -> None:
    async with attached(sidecar) as caller:
        assert caller.attached.capacity_blocks == caller.attached.free_blocks == CAPACITY
        for job in "abcd":
            await caller.store(job, 4)
        settled = await caller.until(lambda s: s.free_slots >= 1, "a free slot")
        assert settled.disk_blocks >= 9 and settled.committed_slots <= 7
        assert await on_disk(caller, "a") == [0, 1, 2, 3]
        for job in "abcdabcd":  # each brings others to the disk
            assert await caller.load(job, 4) >= 1
        stats = await caller.stats()
        assert stats.committed_bytes_total == 16 * BLOCK_BYTES
        assert stats.looked_up_bytes_total == 32 * BLOCK_BYTES
        assert stats.disk_blocks + stats.committed_slots == 16
        metrics = sidecar.metrics()
        for direction, blocks in (
            ("out", stats.spilled_blocks_total),
            ("in", stats.fetched_blocks_total),
        ):
            labels = f'{{direction="{direction}",tier="disk"}}'
            assert metrics[f"fastserve_kv_tier_bytes_total{labels}"] >= blocks * BLOCK_BYTES > 0
            assert metrics[f"fastserve_kv_tier_seconds_total{labels}"] > 0
        found = 'fastserve_kv_lookups_total{result="disk"}'
        assert metrics[found] >= 4
        assert metrics["fastserve_disk_kv_usage_ratio"] > 0.5
        await caller.release(*"abcd")
        empty = await caller.until(lambda s: s.free_slots == HOST, "an empty host")
        assert (empty.free_disk_slots, empty.jobs) == (DISK, 0)


async def test_both_tiers_full_still_give_every_block_back(sidecar: Running) -> None:
    async with attached(sidecar) as caller:
        for number in range(CAPACITY):
            await caller.store(f"job-{number}", 1)
        await refused(caller.reserve("more", 0), FULL, "1 blocks wanted, room for 0")
        for number in [*range(CAPACITY), *range(CAPACITY)]:
            await caller.load(f"job-{number}", 1)
        assert (await caller.release("job-3")).free_slots == 1
        await caller.store("more", 1)
        await caller.load("more", 1)


async def test_a_job_larger_than_the_host_is_refused_at_once(sidecar: Running) -> None:
    async with attached(sidecar) as caller:
        await refused(caller.reserve("a", *range(HOST + 1)), FULL, "9 blocks wanted, room for 8")


async def test_a_job_longer_than_the_host_can_be_read(sidecar: Running) -> None:
    """Stored in two steps, as it grew."""
    async with attached(sidecar) as caller:
        await caller.store("a", 7)
        await caller.store("a", 7, first=7)
        assert await caller.load("a", 14) == 14  # pieces of one block: half the headroom


async def test_slots_that_are_read_are_neither_spilled_nor_given_away(sidecar: Running) -> None:
    async with attached(sidecar) as caller, contextlib.AsyncExitStack() as stack:
        readings = []
        for job in "abcdefg":
            await caller.store(job, 1)
            readings.append(await stack.enter_async_context(caller.reading(job, 0)))
        slots = [(await reading.piece()).slots[0] for reading in readings]
        assert len(set(slots)) == 7
        waiting = asyncio.create_task(caller.reserve("x", 0, 1))
        await caller.release("a")  # its slot is free only after its reader
        stats = await caller.stats()
        assert (stats.free_slots, stats.disk_blocks, waiting.done()) == (1, 0, False)
        await readings[0].acknowledge()
        assert len(await asyncio.wait_for(waiting, 20)) == 2


async def test_a_reader_that_dies_leaves_no_pins(sidecar: Running) -> None:
    async with attached(sidecar) as caller:
        await caller.store("a", 4)
        async with caller.reading("a", 0, 1, 2, 3) as reading:
            await reading.piece()
        await caller.release("a")
        await caller.until(lambda s: s.free_slots == HOST, "an empty host")


async def test_a_missing_block_is_said_to_be_missing(sidecar: Running) -> None:
    async with attached(sidecar) as caller:
        await caller.store("a", 2)
        missing = grpc.StatusCode.NOT_FOUND
        await refused(caller.read("a", 0, 1, 2), missing, "block 2 is not here")
        await refused(caller.read("b", 0), missing, "block 0")
        assert sidecar.metrics()['fastserve_kv_lookups_total{result="miss"}'] == 4


# --- what breaks ---------------------------------------------------------------------------------


async def test_a_byte_that_changed_on_the_disk_costs_the_job_its_copy(
    sidecar: Running, tmp_path: Path
) -> None:
    async with attached(sidecar) as caller:
        for job in "abc":
            await caller.store(job, 4)
        await caller.until(lambda s: s.disk_blocks >= 5, "spills")
        assert await on_disk(caller, "a") == [0, 1, 2, 3]
        with disk_file(tmp_path).open("r+b") as file:  # the first slots are those of job a
            file.seek(SLOT + 77)
            old = file.read(1)
            file.seek(SLOT + 77)
            file.write(bytes([old[0] ^ 1]))
        await refused(caller.load("a", 4), LOST, "copy on the disk is lost")
        assert not (await caller.lookup("a")).job_ids
        assert sidecar.metrics()['fastserve_kv_verify_failures_total{tier="disk"}'] == 1
        for job in "bc":
            await caller.load(job, 4)
        await caller.store("a", 4)  # computed again
        await caller.load("a", 4)
        await caller.release(*"abc")
        await caller.until(lambda s: s.free_slots == HOST and s.free_disk_slots == DISK, "free")


async def test_a_disk_that_cannot_be_read_costs_the_job_its_copy(
    sidecar: Running, tmp_path: Path
) -> None:
    async with attached(sidecar) as caller:
        for job in "abc":
            await caller.store(job, 4)
        await caller.until(lambda s: s.disk_blocks >= 5, "spills")
        os.truncate(disk_file(tmp_path), 0)
        await refused(caller.load("a", 4), LOST, "copy on the disk is lost")
        metrics = sidecar.metrics()
        # A spill may have lengthened the file again; then zeros are read, and seen by checksum.
        failed = metrics.get('fastserve_kv_failures_total{kind="disk_read"}', 0)
        assert failed + metrics.get('fastserve_kv_verify_failures_total{tier="disk"}', 0) >= 1
        await caller.load("c", 2)  # still on the host


async def test_a_disk_that_takes_no_more_is_left_alone(sidecar: Running) -> None:
    """Writes beyond the limit fail as on a full disk."""
    async with attached(sidecar) as caller:
        resource.prlimit(sidecar.process.pid, resource.RLIMIT_FSIZE, (2 * SLOT, -1))
        for number in range(HOST):
            await caller.store(f"job-{number}", 1)
        metric = 'fastserve_kv_failures_total{kind="disk_full"}'
        await refused(caller.reserve("more", 0, 1, 2), FULL, "3 blocks wanted, room for|host slots")
        assert sidecar.metrics()[metric] >= 1
        stats = await caller.stats()
        assert stats.disk_blocks <= 2  # what fitted under the limit
        for number in range(HOST):
            await caller.load(f"job-{number}", 1)


async def test_a_damaged_host_copy_is_forgotten_and_counted(sidecar: Running) -> None:
    async with attached(sidecar) as caller:
        await caller.store("a", 2)
        async with caller.reading("a", 0, 1) as reading:
            await reading.piece()
            await reading.acknowledge(damaged=True)
            await reading.end()
        assert not (await caller.lookup("a")).job_ids
        assert sidecar.metrics()['fastserve_kv_verify_failures_total{tier="host"}'] == 1


async def test_a_sidecar_killed_while_it_spills_leaves_nothing_that_is_believed(
    tmp_path: Path,
) -> None:
    size, slots = 1 << 20, 24
    disk_bytes = 64 * size
    with start(tmp_path, disk_bytes=disk_bytes, host=slots) as running:
        async with attached(running, size=size) as caller:
            for number in range(6):
                await caller.store(f"job-{number}", 6, size)
            await caller.until(lambda s: s.spilled_blocks_total > 0, "the first spill")
            running.kill()
    assert len(scratch(tmp_path)) == 2
    with start(tmp_path, disk_bytes=disk_bytes, host=slots) as running:
        assert len(scratch(tmp_path)) == 1  # a new disk file
        async with attached(running, epoch=2, size=size) as caller:
            assert not (await caller.lookup()).job_ids
            await refused(caller.load("job-0", 6, size), grpc.StatusCode.NOT_FOUND, "not here")
            for number in range(6):
                await caller.store(f"job-{number}", 6, size)
            for number in range(6):
                await caller.load(f"job-{number}", 6, size)
    assert not scratch(tmp_path)


def test_a_disk_larger_than_the_file_system_stops_the_start(tmp_path: Path) -> None:
    flags = ["--listen", f"unix:{tmp_path}/s", "--disk-path", str(tmp_path), "--disk-size", "900T"]
    command = [sys.executable, "-m", "fastserve.kv_offload", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "cannot reserve" in ended.stderr and "Lower --disk-size" in ended.stderr
    assert not scratch(tmp_path)


# --- owners --------------------------------------------------------------------------------------


async def test_committed_blocks_outlive_the_worker_on_both_tiers(sidecar: Running) -> None:
    async with attached(sidecar, epoch=1) as old:
        for job in "abc":
            await old.store(job, 4)
        await old.reserve("d", 0)
    async with attached(sidecar, epoch=2) as new:
        found = await new.lookup()
        assert (list(found.job_ids), list(found.block_counts)) == (["a", "b", "c"], [4, 4, 4])
        assert (await new.stats()).reserved_slots == 0
        for job in "abc":
            await new.load(job, 4)


async def test_the_blocks_of_a_worker_that_never_comes_back_are_freed(tmp_path: Path) -> None:
    with start(tmp_path, "--owner-lease", "2") as running:
        async with attached(running) as caller:
            assert caller.attached.owner_lease_seconds == 2
            await caller.store("a", 4)
            async with asyncio.timeout(20):
                for _ in range(5):  # kept for longer than a lease by nothing but this
                    await asyncio.sleep(0.5)
                    await caller.stub.Renew(pb.RenewRequest(**caller.who))
            await caller.load("a", 4)
            gone = await caller.until(lambda s: s.owners == 0, "the end of the lease")
            assert (gone.slots, gone.jobs) == (0, 0)
            assert len(scratch(tmp_path)) == 1  # the disk file alone
            renewal = caller.stub.Renew(pb.RenewRequest(**caller.who))
            await refused(renewal, STALE, "attach again")
            assert running.metrics()['fastserve_kv_failures_total{kind="lease_expired"}'] == 1
        async with attached(running, epoch=1) as again:
            assert not (await again.lookup()).job_ids
            assert again.attached.free_blocks == CAPACITY


async def test_a_frozen_worker_that_wakes_up_spoils_nothing(tmp_path: Path) -> None:
    """Its lease ended, and its memory belongs to another: it still writes into its old mapping."""
    with start(tmp_path, "--owner-lease", "2") as running:
        async with attached(running) as frozen:
            slots = await frozen.reserve("a", 0, 1)
            await frozen.until(lambda s: s.owners == 0, "the end of the lease")
            async with attached(running, worker="other") as other:
                await other.store("b", 2)
                for slot in slots:
                    frozen.overwrite(slot, b"\xff" * BLOCK_BYTES)
                await other.load("b", 2)
            await refused(frozen.commit("a", slots, [16, 16]), STALE, "attach again")


async def test_another_worker_has_to_wait_for_a_part(sidecar: Running) -> None:
    async with attached(sidecar):
        with pytest.raises(grpc.aio.AioRpcError, match="all memory belongs to w") as caught:
            async with attached(sidecar, worker="other"):
                pass
        assert caught.value.code() is FULL


async def test_two_workers_share_memory_and_disk_in_equal_parts(tmp_path: Path) -> None:
    with start(tmp_path, "--workers", "2") as running:
        async with attached(running, worker="v") as one, attached(running, worker="w") as other:
            assert one.attached.pool_path != other.attached.pool_path
            assert one.attached.capacity_blocks == HOST + DISK // 2 - 1
            for number in range(12):
                await one.store(f"job-{number}", 1)
                await other.store(f"job-{number}", 1)
            for number in range(12):
                await one.load(f"job-{number}", 1)
                await other.load(f"job-{number}", 1)
            assert (await one.stats()).owners == 2
            assert list((await one.release("job-0")).ListFields())
            await other.load("job-0", 1)


def test_the_process_ends_on_sigterm_with_blocks_on_the_move(tmp_path: Path) -> None:
    async def fill(running: Running) -> None:
        async with attached(running) as caller:
            for number in range(12):
                await caller.store(f"job-{number}", 1)

    with start(tmp_path) as running:
        asyncio.run(fill(running))
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0
    assert not scratch(tmp_path)
