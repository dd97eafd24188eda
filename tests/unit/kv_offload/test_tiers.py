"""What moves between host and disk, with a disk that is as slow and as broken as the test wants."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import xxhash

from fastserve.kv_offload import tiers as module
from fastserve.kv_offload.disk import DiskFile, DiskRegion
from fastserve.kv_offload.errors import BlockLost, PoolFull, StaleCall
from fastserve.kv_offload.metrics import Metrics
from fastserve.kv_offload.pool import Pool
from fastserve.kv_offload.slots import Holder
from fastserve.kv_offload.tiers import Tiers
from support.waiting import eventually

SLOTS, DISK_SLOTS, SIZE = 8, 8, 4096


class GatedDisk(DiskRegion):
    """Reads and writes begin when the gate opens, and fail with `error` if it is set."""

    def __init__(self, file: DiskFile) -> None:
        super().__init__(file, 0, file.size, SIZE)
        self.gate = threading.Event()
        self.gate.set()
        self.error: OSError | None = None
        self.reads = self.writes = 0

    def _pass(self) -> None:
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error

    def write(self, slot: int, data: memoryview) -> None:
        self._pass()
        super().write(slot, data)
        self.writes += 1

    def read(self, slot: int, into: memoryview, block_bytes: int, checksum: int) -> None:
        self._pass()
        super().read(slot, into, block_bytes, checksum)
        self.reads += 1


class Rig:
    def __init__(self, folder: Path) -> None:
        self.file = DiskFile(folder, DISK_SLOTS * SIZE)
        self.disk = GatedDisk(self.file)
        metrics = Metrics()
        self.tiers = Tiers(Pool(folder, SLOTS * SIZE), SLOTS, 16, SIZE, self.disk, metrics)
        self.table = self.tiers.table

    async def store(self, job: str, count: int = 1) -> None:
        slots = await self.tiers.reserve(job, range(count))
        for index, slot in enumerate(slots):
            self.tiers.host_view(slot)[:] = data(job, index)
        sums = [xxhash.xxh3_64_intdigest(data(job, index)) for index in range(count)]
        self.tiers.commit(job, slots, [16] * count, sums)

    async def load(self, job: str, *indexes: int) -> None:
        blocks = await self.tiers.open(job, indexes)
        for block in blocks:
            assert block.slot is not None
            assert self.tiers.host_view(block.slot) == data(job, block.index)
        self.tiers.close_blocks(blocks)

    async def still(self) -> None:
        """Wait until nothing moves, then check the table."""
        await eventually(lambda: not self.tiers._spills and not self.tiers._fetches)
        self.table.check_integrity()


def data(job: str, index: int) -> bytes:
    seed = f"{job}/{index}/".encode()
    return (seed * SIZE)[:SIZE]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.disk.gate.set()
    await rig.tiers.close()
    rig.file.close()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the seconds that somebody waits for host slots; the product's are enough for the disk
    of a busy machine."""
    return lambda seconds: monkeypatch.setattr(module, "PATIENCE_S", seconds)


async def test_spilling_starts_before_the_host_is_full(rig: Rig) -> None:
    for number in range(SLOTS - 1):
        await rig.store(f"{number}")
    await rig.still()
    assert rig.disk.writes == 0
    await rig.store("last")
    await rig.still()
    assert (rig.disk.writes, rig.table.free) == (1, rig.table.headroom)


async def test_a_reservation_waits_for_a_spill_and_no_longer(
    rig: Rig, patience: Callable[[float], None]
) -> None:
    rig.disk.gate.clear()
    await rig.store("a", 7)
    patience(0.3)
    waiting = asyncio.create_task(rig.store("b", 3))
    with pytest.raises(PoolFull, match="3 host slots wanted, 1 free"):
        await waiting
    patience(20.0)
    rig.disk.gate.set()
    await rig.store("b", 3)
    await rig.load("a", 0, 1)
    await rig.load("b", 0, 1, 2)


async def test_those_who_wait_are_served_in_the_order_they_came(rig: Rig) -> None:
    rig.disk.gate.clear()
    await rig.store("a", 7)
    order: list[str] = []

    async def reserve(name: str, count: int) -> None:
        await rig.tiers.reserve(name, range(count))
        order.append(name)

    waiting = [asyncio.create_task(reserve(name, n)) for name, n in (("big", 4), ("small", 1))]
    await asyncio.sleep(0)  # a turn for both; the small one would fit, but has to wait
    assert order == [] and rig.table.free == 1
    rig.disk.gate.set()
    await asyncio.gather(*waiting)
    assert order == ["big", "small"]


async def test_a_wait_that_is_given_up_leaves_no_reservation(rig: Rig) -> None:
    rig.disk.gate.clear()
    await rig.store("a", 8)
    waiting = asyncio.create_task(rig.tiers.reserve("b", range(4)))
    await asyncio.sleep(0)
    waiting.cancel()
    rig.disk.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await rig.still()
    assert rig.table.reserved == 0


async def test_a_host_full_of_reserved_slots_costs_a_job_on_the_disk_its_copy(
    rig: Rig, patience: Callable[[float], None]
) -> None:
    """Its alternative would be to wait for ever."""
    await rig.store("a", 1)
    await rig.store("b", 7)
    await rig.still()
    assert not rig.table.find("a", [0])[0].readable
    await rig.tiers.reserve("c", range(1))
    for index in range(7):
        block = rig.table.find("b", [index])[0]
        if block.readable:
            rig.table.pin(block)
    await rig.still()
    if rig.table.free:
        await rig.tiers.reserve("d", range(rig.table.free), Holder.PEER)
    patience(0.3)
    with pytest.raises(BlockLost, match="no host slot"):
        await rig.load("a", 0)
    assert not rig.table.lookup("a")
    await rig.still()


async def test_two_readers_of_a_block_share_one_fetch(rig: Rig) -> None:
    await rig.store("a")
    await rig.store("b", 7)
    await rig.still()
    rig.disk.gate.clear()
    readers = [asyncio.create_task(rig.load("a", 0)) for _ in range(2)]
    await asyncio.sleep(0)
    rig.disk.gate.set()
    await asyncio.gather(*readers)
    assert rig.disk.reads == 1


@pytest.mark.parametrize("moment", ["spill", "fetch"])
async def test_a_job_released_while_it_moves_leaves_nothing(rig: Rig, moment: str) -> None:
    await rig.store("a")
    reader = None
    if moment == "fetch":
        await rig.store("b", 7)
        await rig.still()
        rig.disk.gate.clear()
        reader = asyncio.create_task(rig.load("a", 0))
        await eventually(lambda: rig.tiers._fetches)
    else:
        rig.disk.gate.clear()
        await rig.store("b", 7)
        assert rig.tiers._spills
    rig.tiers.forget("a")
    rig.tiers.forget("b")
    await rig.store("c", 6)  # what is left; what moves is not given away
    assert rig.table.free < 2
    rig.disk.gate.set()
    if reader is not None:
        with pytest.raises(BlockLost):
            await reader
    await rig.load("c", *range(6))
    rig.tiers.forget("c")
    await rig.still()
    assert (rig.table.free, rig.table.free_disk) == (SLOTS, DISK_SLOTS)


async def test_a_disk_that_failed_is_tried_again_after_a_while(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DISK_PAUSE_S", 1.0)
    rig.disk.error = OSError(errno.ENOSPC, "full")
    await rig.store("a", 8)
    await eventually(lambda: not rig.table.disk_open)
    await rig.still()
    assert rig.table.room == 0  # 16 blocks would fit if the disk took them
    with pytest.raises(PoolFull):
        await rig.tiers.reserve("b", [0])
    rig.disk.error = None
    await eventually(lambda: rig.table.disk_open)
    await rig.store("b")
    await rig.load("a", *range(4))


async def test_closing_waits_for_the_disk_and_refuses_who_waits(rig: Rig) -> None:
    rig.disk.gate.clear()
    await rig.store("a", 8)
    waiting = asyncio.create_task(rig.tiers.reserve("b", range(4)))
    await eventually(lambda: rig.tiers._line)
    closing = asyncio.create_task(rig.tiers.close())
    with pytest.raises(StaleCall):
        await waiting
    assert not closing.done()
    rig.disk.gate.set()
    await asyncio.wait_for(closing, 20)
    assert rig.disk.writes > 0
    rig.tiers = Tiers(Pool(rig.file.path.parent, SIZE), 1, 16, SIZE, None, Metrics())
