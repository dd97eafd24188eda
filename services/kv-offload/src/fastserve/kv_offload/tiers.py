"""The blocks of one worker: the slot table, the files behind it, and what moves between them.

Runs on the event loop, one owner of the table, so no locks; reads and writes of the disk run in
threads. Spilling runs ahead of need: as soon as fewer host slots are free than the headroom, the
blocks that were used longest ago go to the disk. Who needs host slots that are not free waits in
line, for a few seconds at the most.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog

from fastserve.kv_offload.cached_slots import CachedBlock
from fastserve.kv_offload.disk import THREADS, Corrupt, DiskRegion
from fastserve.kv_offload.errors import BlockLost, BlockMissing, PoolFull, StaleCall
from fastserve.kv_offload.metrics import Metrics
from fastserve.kv_offload.pool import Pool, slot_bytes
from fastserve.kv_offload.slots import Block, Holder, SlotTable

log = structlog.get_logger(__name__)
PATIENCE_S = 5.0  # for host slots; less than the worker's own for its calls
_PIECE_BYTES = 256 << 20
_DISK_PAUSE_S = 10.0  # after a write that failed
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Waiter:
    """Someone who needs `count` host slots; `take` takes them as soon as they are free."""

    count: int
    take: Callable[[], None]
    done: asyncio.Future[None]


class Tiers:
    """Host pool and disk region of one worker."""

    def __init__(
        self,
        pool: Pool,
        slots: int,
        block_size: int,
        block_bytes: int,
        disk: DiskRegion | None,
        metrics: Metrics,
    ) -> None:
        self.table = SlotTable(slots, block_size, disk.slots if disk is not None else 0)
        self.pool, self.block_bytes = pool, block_bytes
        self.slot_bytes = slot_bytes(block_bytes)
        self._disk, self._metrics = disk, metrics
        self._line: deque[_Waiter] = deque()
        self._spills: set[asyncio.Task[None]] = set()
        self._fetches: dict[Block, asyncio.Task[None]] = {}
        self._reserved_at: dict[int, float] = {}  # by host slot, the last time
        self.closed = False
        self.spilled = self.fetched = 0

    # --- writing -----------------------------------------------------------------------------

    async def reserve(
        self, job_id: str, block_indexes: Sequence[int], holder: Holder = Holder.WORKER
    ) -> list[int]:
        """`SlotTable.reserve`, but waits for host slots if there is room at all."""
        slots: list[int] = []

        def take() -> None:
            slots.extend(self.table.reserve(job_id, block_indexes, holder))

        self.table.check(job_id, block_indexes)
        try:
            await self._wait(len(block_indexes), take)
        except asyncio.CancelledError:
            self.table.cancel(job_id, slots)
            raise
        self._reserved_at.update(dict.fromkeys(slots, time.perf_counter()))
        return slots

    def commit(
        self,
        job_id: str,
        slots: Sequence[int],
        valid_tokens: Sequence[int],
        checksums: Sequence[int],
    ) -> None:
        """`SlotTable.commit` of what the worker has copied."""
        self.table.commit(job_id, slots, valid_tokens, checksums)
        self._copied_out(slots)

    def fill_cache(self, most: int) -> list[int]:
        """`CachedSlots.fill`, but nothing while others wait for slots."""
        slots = self.table.cache.fill(0 if self._line else most)
        self._reserved_at.update(dict.fromkeys(slots, time.perf_counter()))
        self.changed()
        return slots

    def keep_cached(
        self, slots: Sequence[int], keys: Sequence[bytes], checksums: Sequence[int]
    ) -> None:
        """`CachedSlots.keep` of what the worker has copied."""
        self.table.cache.keep(slots, keys, checksums)
        self._copied_out(slots)

    def _copied_out(self, slots: Sequence[int]) -> None:
        now = time.perf_counter()
        started = min((self._reserved_at[slot] for slot in slots), default=now)
        self._metrics.moved("host", "out", len(slots) * self.block_bytes, now - started)
        self.changed()

    def host_view(self, slot: int) -> memoryview:
        """The whole slot."""
        return self.pool.view(slot * self.slot_bytes, self.slot_bytes)

    # --- reading -----------------------------------------------------------------------------

    @property
    def piece(self) -> int:
        """How many blocks should be opened at once at the most: two pieces fit the headroom, and
        the disk reads one in a fraction of a second."""
        if self._disk is None:
            return self.table.slots
        return max(1, min(self.table.headroom // 2, _PIECE_BYTES // self.slot_bytes))

    def find(self, job_id: str, block_indexes: Sequence[int]) -> list[Block]:
        """`SlotTable.find`, counted."""
        try:
            return self.table.find(job_id, block_indexes)
        except BlockMissing:
            self._metrics.found(miss=len(block_indexes))
            raise

    async def open(self, job_id: str, block_indexes: Sequence[int]) -> list[Block]:
        """The named blocks, pinned and on the host; `close_blocks` ends the reading.

        Raises `BlockMissing`, or `BlockLost` after which the job is forgotten.
        """
        blocks = self.find(job_id, block_indexes)
        for block in blocks:
            self.table.pin(block)
        try:
            away = [block for block in blocks if not block.readable]
            if away:
                await self._fetch(job_id, away)
            self._metrics.found(host=len(blocks) - len(away), disk=len(away))
        except BaseException:
            self.close_blocks(blocks)
            raise
        return blocks

    def close_blocks(self, blocks: Sequence[Block]) -> None:
        """These have been read."""
        for block in blocks:
            self.table.unpin(block)
        self.changed()

    def open_cached(self, keys: Sequence[bytes]) -> list[CachedBlock]:
        """`CachedSlots.pin`, counted; `close_cached` ends the reading."""
        blocks = self.table.cache.pin(keys)
        self._metrics.found(host=len(blocks), miss=len(keys) - len(blocks))
        return blocks

    def close_cached(self, blocks: Sequence[CachedBlock], *, damaged: bool = False) -> None:
        """These have been read. damaged: one of them is not what it should be."""
        if damaged:
            self.table.cache.forget(blocks)
        self.table.cache.unpin(blocks)
        self.changed()

    def forget(self, job_id: str) -> int:
        """Release a job; how many slots."""
        freed = self.table.release(job_id)
        self.changed()
        return freed

    # --- moving ------------------------------------------------------------------------------

    async def _fetch(self, job_id: str, blocks: Sequence[Block]) -> None:
        """Bring blocks to the host, together with those others are bringing already."""
        missing = [block for block in blocks if block.slot is None]

        def take() -> None:
            for block in missing:
                if block.slot is None and not block.forgotten:
                    self.table.begin_fetch(block)
                    self._fetches[block] = asyncio.create_task(self._read(block))

        try:
            if missing:
                await self._wait(len(missing), take)
        except PoolFull as error:
            # The job would wait for a room that may never come: computing it again ends.
            self._metrics.failed("no_host_slot")
            self.forget(job_id)
            raise BlockLost(f"job {job_id}: no host slot to read it from the disk") from error
        under_way = [self._fetches[block] for block in blocks if block in self._fetches]
        if under_way:
            await asyncio.wait(under_way)
        if not all(block.readable and not block.forgotten for block in blocks):
            raise BlockLost(f"job {job_id}: its copy on the disk is lost")

    async def _read(self, block: Block) -> None:
        """Disk to host."""
        assert self._disk is not None and block.slot is not None and block.disk_slot is not None
        started = time.perf_counter()
        view, read = self.host_view(block.slot), False
        arguments = (block.disk_slot, view, self.block_bytes, block.checksum)
        try:
            await _in_thread(self._disk, self._disk.read, *arguments)
            read = True
        except Corrupt as error:
            log.error("a copy on the disk is damaged", job_id=block.job_id, reason=str(error))
            self._metrics.verify_failed("disk")
        except OSError as error:
            log.error("the disk cannot be read", job_id=block.job_id, reason=str(error))
            self._metrics.failed("disk_read")
        del self._fetches[block]
        self.table.end_fetch(block, read)
        if read:
            self.fetched += 1
            self._metrics.moved("disk", "in", self.block_bytes, time.perf_counter() - started)
        elif not block.forgotten:
            self.table.release(block.job_id)
        self.changed()

    def _spill_ahead(self) -> None:
        wanted = max(self.table.headroom, self._line[0].count if self._line else 0)
        while (
            len(self._spills) < THREADS
            and self.table.free + self.table.cache.busy + self.table.spilling < wanted
            and (block := self.table.begin_spill()) is not None
        ):
            task = asyncio.create_task(self._write(block))
            self._spills.add(task)
            task.add_done_callback(self._spills.discard)

    async def _write(self, block: Block) -> None:
        """Host to disk."""
        assert self._disk is not None and block.slot is not None and block.disk_slot is not None
        started = time.perf_counter()
        view, written = self.host_view(block.slot), False
        try:
            await _in_thread(self._disk, self._disk.write, block.disk_slot, view)
            written = True
        except OSError as error:
            # The block stays on the host. A full disk may have room again later.
            log.error("the disk takes no blocks", reason=str(error), pause_s=_DISK_PAUSE_S)
            self._metrics.failed("disk_full" if error.errno in _FULL else "disk_write")
            self.table.disk_open = False
            asyncio.get_running_loop().call_later(_DISK_PAUSE_S, self._reopen_disk)
        self.table.end_spill(block, written)
        if written:
            self.spilled += 1
            self._metrics.moved("disk", "out", self.block_bytes, time.perf_counter() - started)
        # The task is not over yet, but its thread is.
        task = asyncio.current_task()
        if task is not None:
            self._spills.discard(task)
        self.changed()

    def _reopen_disk(self) -> None:
        self.table.disk_open = True
        self.changed()

    # --- waiting -----------------------------------------------------------------------------

    async def _wait(self, count: int, take: Callable[[], None]) -> None:
        """Wait in line until `count` host slots are free, then take them.

        Raises `PoolFull` when they are not within a few seconds.
        """
        waiter = _Waiter(count, take, asyncio.get_running_loop().create_future())
        self._line.append(waiter)
        try:
            self.changed()
            if not waiter.done.done():
                await asyncio.wait([waiter.done], timeout=PATIENCE_S)
        finally:
            if waiter in self._line:
                self._line.remove(waiter)
        if not waiter.done.done():
            self.changed()  # those behind may want less
            raise PoolFull(
                f"{count} host slots wanted, {self.table.free} free; the others are being "
                "written or read, or the disk takes no more"
            )
        waiter.done.result()

    def changed(self) -> None:
        """Something in the table changed: serve who waits, keep slots free."""
        if self.closed:
            return
        while self._line and self._line[0].count <= self.table.free:
            waiter = self._line.popleft()
            if waiter.done.done():
                continue
            try:
                waiter.take()
            except PoolFull as error:  # the room went to others meanwhile
                waiter.done.set_exception(error)
            else:
                waiter.done.set_result(None)
        self._spill_ahead()

    async def close(self) -> None:
        """End all moves, refuse who waits, remove the pool."""
        self.closed = True
        for waiter in self._line:
            if not waiter.done.done():
                waiter.done.set_exception(StaleCall("the pool was given up"))
        self._line.clear()
        moves = [*self._spills, *self._fetches.values()]
        if moves:
            await asyncio.wait(moves)
        self.pool.close()


async def _in_thread(disk: DiskRegion, function: Callable[..., T], *arguments: object) -> T:
    return await asyncio.get_running_loop().run_in_executor(disk.threads, function, *arguments)
