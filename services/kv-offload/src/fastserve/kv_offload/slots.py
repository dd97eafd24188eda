"""Which slot holds which KV block, on the host and on the disk: pure bookkeeping, no I/O.

A host slot is free, reserved (somebody may be writing it) or holds a committed block. A committed
block is on the host or on the disk. While it moves it has a slot in both places, and neither is
anybody else's before the move has ended:

    reserve ──▶ commit ──▶ on the host ──spill──▶ on the disk
                               ▲                      │
                               └────────fetch─────────┘

A pinned block is being read: it stays on the host, and if it is forgotten meanwhile, its slot is
free only after the last reader. So no slot is ever handed out while bytes of an earlier block may
still be read from it or written to it.

Blocks are named by (job id, block index). Free host slots may hold blocks of the prefix cache,
named by content: `CachedSlots`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from fastserve.kv_offload.cached_slots import CachedSlots
from fastserve.kv_offload.errors import BlockMissing, NoFreeSlot, PoolFull, SlotError
from fastserve.kv_offload.free_slots import FreeSlots

_HEADROOM = 8  # one host slot in so many is kept free while there is a disk


class Holder(Enum):
    """Who writes a reserved slot."""

    WORKER = auto()
    PEER = auto()
    NOBODY = auto()  # a peer still writes, but the job was released: it is not committed any more


class Move(Enum):
    """A move under way: to the disk, or back."""

    SPILL = auto()
    FETCH = auto()


@dataclass(slots=True, eq=False)
class Block:
    """A committed block: what it holds, where it is, who reads it. checksum: xxh3_64."""

    job_id: str
    index: int
    valid_tokens: int
    checksum: int
    slot: int | None
    disk_slot: int | None = None
    move: Move | None = None
    pins: int = 0
    forgotten: bool = False

    @property
    def readable(self) -> bool:
        """Whether its bytes are in the host slot."""
        return self.slot is not None and self.move is not Move.FETCH


@dataclass(slots=True)
class JobSlots:
    """Blocks of one job by index, and its reserved slots: slot -> (block index, holder)."""

    committed: dict[int, Block] = field(default_factory=dict)
    reserved: dict[int, tuple[int, Holder]] = field(default_factory=dict)


class SlotTable:
    """State of `slots` host slots and `disk_slots` on the disk, each for one block of `block_size`
    tokens."""

    def __init__(self, slots: int, block_size: int, disk_slots: int = 0) -> None:
        self.slots, self.disk_slots = slots, disk_slots
        self.block_size = block_size
        # Host slots that new blocks do not count on: with both tiers full of blocks, a block on the
        # disk could not come back otherwise. Spilling begins when fewer are free.
        self.headroom = -(-slots // _HEADROOM) if disk_slots else 0
        self.disk_open = True  # closed for a while when writing to it failed
        self.cache, self._free_disk = CachedSlots(slots), FreeSlots(disk_slots)
        self._jobs: dict[str, JobSlots] = {}
        self._idle: OrderedDict[Block, None] = OrderedDict()  # may be spilled; oldest use first
        self._lingering: set[Block] = set()  # forgotten, but read or moving
        self.reserved = self.committed = self.on_disk = self.spilling = 0

    # --- counts ------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Free host slots, those with cached blocks included."""
        return len(self.cache)

    @property
    def in_use(self) -> int:
        """Host slots that jobs have."""
        return self.slots - self.free - self.cache.busy

    @property
    def free_disk(self) -> int:
        return len(self._free_disk)

    @property
    def capacity(self) -> int:
        """Blocks that can be held on both tiers together."""
        return self.slots + self.disk_slots - self.headroom

    @property
    def room(self) -> int:
        """Blocks that can still be held."""
        held = self.reserved + self.committed
        if self.disk_open:
            return max(0, self.capacity - held)
        return max(0, self.slots - self.headroom - (held - self.on_disk))

    @property
    def jobs(self) -> list[str]:
        return list(self._jobs)

    # --- writing -----------------------------------------------------------------------------

    def reserve(
        self, job_id: str, block_indexes: Sequence[int], holder: Holder = Holder.WORKER
    ) -> list[int]:
        """One free host slot per block index, all or nothing.

        Raises `SlotError` for an index named twice, `PoolFull` when there is no room, `NoFreeSlot`
        when there will be once blocks have been spilled or read.
        """
        count = len(block_indexes)
        self.check(job_id, block_indexes)
        if count > self.free:
            raise NoFreeSlot(f"{count} slots wanted, {self.free} free")
        job = self._jobs.setdefault(job_id, JobSlots())
        taken = self.cache.take(count)
        for slot, index in zip(taken, block_indexes, strict=True):
            job.reserved[slot] = (index, holder)
        self.reserved += count
        return taken

    def check(self, job_id: str, block_indexes: Sequence[int]) -> None:
        """Raises `SlotError` or `PoolFull` if `reserve` would, whatever is free at the moment."""
        count = len(block_indexes)
        if len(set(block_indexes)) != count:
            raise SlotError(f"job {job_id}: a block index is named twice")
        if count > min(self.room, self.slots):
            raise PoolFull(f"{count} blocks wanted, room for {min(self.room, self.slots)}")

    def cancel(self, job_id: str, slots: Sequence[int]) -> None:
        """Free reserved slots that will not be committed. Those freed already are skipped."""
        job = self._jobs.get(job_id)
        if job is not None:
            self._unreserve(job_id, [slot for slot in slots if slot in job.reserved])

    def commit(
        self,
        job_id: str,
        slots: Sequence[int],
        valid_tokens: Sequence[int],
        checksums: Sequence[int],
        holder: Holder = Holder.WORKER,
    ) -> None:
        """Make reserved slots readable; an older commit of the same block is replaced.

        Raises `SlotError` if a slot is not reserved for the job by `holder`, or a count is out of
        range.
        """
        if not len(slots) == len(valid_tokens) == len(checksums):
            raise SlotError("slots, valid_tokens and checksums differ in length")
        if len(set(slots)) != len(slots):
            raise SlotError(f"job {job_id}: a slot is named twice")
        job = self._jobs.get(job_id, JobSlots())
        for slot, count in zip(slots, valid_tokens, strict=True):
            if slot not in job.reserved or job.reserved[slot][1] is not holder:
                raise SlotError(f"slot {slot} is not reserved for job {job_id}")
            if not 1 <= count <= self.block_size:
                raise SlotError(f"{count} valid tokens in a block of {self.block_size}")
        for slot, count, checksum in zip(slots, valid_tokens, checksums, strict=True):
            index, _ = job.reserved.pop(slot)
            self.reserved -= 1
            if index in job.committed:
                self._forget(job.committed.pop(index))
            block = Block(job_id, index, count, checksum, slot)
            job.committed[index] = block
            self.committed += 1
            self._idle[block] = None

    def drop_reservations(self) -> int:
        """Free what a past life of the worker reserved and never committed; how many slots. The
        keys of its cache died with it."""
        self.cache.clear()
        freed = 0
        for job_id, job in list(self._jobs.items()):
            slots = [slot for slot, (_, who) in job.reserved.items() if who is Holder.WORKER]
            freed += len(slots)
            self._unreserve(job_id, slots)
        return freed

    # --- reading and forgetting --------------------------------------------------------------

    def lookup(self, job_id: str) -> list[tuple[int, Block]]:
        """Committed blocks of a job by ascending index; empty for an unknown job."""
        job = self._jobs.get(job_id)
        return sorted(job.committed.items()) if job is not None else []

    def find(self, job_id: str, block_indexes: Sequence[int]) -> list[Block]:
        """The named blocks. Raises `BlockMissing` if one is not there."""
        held = self._jobs.get(job_id, JobSlots()).committed
        for index in block_indexes:
            if index not in held:
                raise BlockMissing(f"job {job_id}: block {index} is not here")
        return [held[index] for index in block_indexes]

    def pin(self, block: Block) -> None:
        """Somebody is about to read the block."""
        block.pins += 1
        self._idle.pop(block, None)

    def unpin(self, block: Block) -> None:
        """A reader has ended; now the block is the one used last."""
        block.pins -= 1
        self._settle(block)

    def release(self, job_id: str) -> int:
        """Forget a job; how many of its blocks and of the worker's reservations that were. What a
        peer is sending of it will be refused."""
        job = self._jobs.get(job_id)
        if job is None:
            return 0
        slots = [slot for slot, (_, who) in job.reserved.items() if who is Holder.WORKER]
        for slot, (index, who) in job.reserved.items():
            if who is Holder.PEER:
                job.reserved[slot] = (index, Holder.NOBODY)
        freed = len(slots) + len(job.committed)
        for block in job.committed.values():
            self._forget(block)
        job.committed.clear()
        self._unreserve(job_id, slots)
        return freed

    # --- moving ------------------------------------------------------------------------------

    def begin_spill(self) -> Block | None:
        """Give the block that was used longest ago a slot on the disk; None if there is no such
        block or slot."""
        if not (self._idle and self.free_disk and self.disk_open):
            return None
        block, _ = self._idle.popitem(last=False)
        (block.disk_slot,) = self._free_disk.take(1)
        block.move = Move.SPILL
        self.spilling += 1
        return block

    def end_spill(self, block: Block, written: bool) -> None:
        """The block is on the disk now, unless that failed or somebody began to read it."""
        block.move = None
        self.spilling -= 1
        if written and not block.pins and not block.forgotten:
            self._free_host_slot(block)
            self.on_disk += 1
        else:
            self._free_disk_slot(block)
        self._settle(block)

    def begin_fetch(self, block: Block) -> None:
        """Give a block on the disk a host slot. Raises `NoFreeSlot`."""
        if not self.free:
            raise NoFreeSlot("no host slot is free")
        (block.slot,) = self.cache.take(1)
        block.move = Move.FETCH
        if not block.forgotten:
            self.on_disk -= 1

    def end_fetch(self, block: Block, read: bool) -> None:
        """The block is on the host now, or else still on the disk."""
        block.move = None
        if read:
            self._free_disk_slot(block)
        else:
            self._free_host_slot(block)
            if not block.forgotten:
                self.on_disk += 1
        self._settle(block)

    # --- inside ------------------------------------------------------------------------------

    def _unreserve(self, job_id: str, slots: Sequence[int]) -> None:
        job = self._jobs[job_id]
        for slot in slots:
            del job.reserved[slot]
        self.cache.give_back(slots)
        self.reserved -= len(slots)
        if not job.reserved and not job.committed:
            del self._jobs[job_id]

    def _forget(self, block: Block) -> None:
        """The caller has taken it out of its job."""
        self.committed -= 1
        if block.slot is None:
            self.on_disk -= 1
        block.forgotten = True
        self._lingering.add(block)
        self._settle(block)

    def _settle(self, block: Block) -> None:
        """Put a block that is neither read nor moving where it belongs."""
        if block.pins or block.move is not None:
            return
        if block.forgotten:
            self._idle.pop(block, None)
            self._lingering.discard(block)
            self._free_host_slot(block)
            self._free_disk_slot(block)
        elif block.slot is not None:
            self._idle[block] = None
            self._idle.move_to_end(block)

    def _free_host_slot(self, block: Block) -> None:
        if block.slot is not None:
            self.cache.give_back([block.slot])
            block.slot = None

    def _free_disk_slot(self, block: Block) -> None:
        if block.disk_slot is not None:
            self._free_disk.give_back([block.disk_slot])
            block.disk_slot = None

    def check_integrity(self) -> None:
        """Raise AssertionError unless every slot is in exactly one place and the counts agree."""
        live = [block for job in self._jobs.values() for block in job.committed.values()]
        blocks = [*live, *self._lingering]
        reserved = [slot for job in self._jobs.values() for slot in job.reserved]
        host = [*self.cache.all_slots(), *reserved, *(b.slot for b in blocks if b.slot is not None)]
        disk = [*self._free_disk, *(b.disk_slot for b in blocks if b.disk_slot is not None)]
        if sorted(host) != list(range(self.slots)):
            raise AssertionError("a host slot is lost or in two places")
        if sorted(disk) != list(range(self.disk_slots)):
            raise AssertionError("a disk slot is lost or in two places")
        for block in live:
            places = (block.slot is not None) + (block.disk_slot is not None)
            if places != (1 if block.move is None else 2):
                raise AssertionError(f"a block is in {places} places")
        idle = {b for b in live if b.readable and b.move is None and not b.pins}
        counts = (len(reserved), len(live), sum(b.slot is None for b in live), idle)
        if counts != (self.reserved, self.committed, self.on_disk, set(self._idle)):
            raise AssertionError("the counts are wrong")
