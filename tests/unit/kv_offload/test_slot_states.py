"""Any order of calls on the slot table, with the bytes that its users would move: no slot is lost
or in two places, nothing is readable that was not committed, and what is readable is right."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastserve.kv_offload.cached_slots import CachedBlock
from fastserve.kv_offload.errors import BlockMissing, NoFreeSlot, PoolFull, SlotError
from fastserve.kv_offload.slots import Block, Holder, Move, SlotTable

SLOTS, DISK_SLOTS = 6, 5
JOBS = st.sampled_from("abc")
KEYS = [b"k1", b"k2", b"k3", b"k4"]


@dataclass(frozen=True)
class Reserved:
    job: str
    index: int
    holder: Holder


@dataclass
class Reader:
    """Has pinned a block with this value, and reads it in this slot once it is there."""

    block: Block
    value: int
    slot: int | None = None


class Slots(RuleBasedStateMachine):
    """The bytes of a block are one number, its checksum. A writer spoils its slot from the moment
    it is reserved, and a move copies its bytes at its very end: whoever uses a slot too early is
    found out."""

    def __init__(self) -> None:
        super().__init__()
        self.values = itertools.count(1)
        self.start()

    def start(self) -> None:
        self.table = SlotTable(SLOTS, 4, DISK_SLOTS)
        self.host = dict.fromkeys(range(SLOTS), 0)
        self.disk = dict.fromkeys(range(DISK_SLOTS), 0)
        self.reserved: dict[int, Reserved] = {}
        self.committed: dict[tuple[str, int], int] = {}  # -> value
        self.readers: list[Reader] = []
        self.moving: list[Block] = []
        self.filling: list[int] = []
        self.offered: dict[bytes, int] = {}  # key -> value that was cached last
        self.cache_readers: list[list[CachedBlock]] = []

    # --- writing ---------------------------------------------------------------------------------

    @rule(
        job=JOBS,
        first=st.integers(0, 3),
        count=st.integers(1, 4),
        holder=st.sampled_from([Holder.WORKER, Holder.PEER]),
    )
    def reserve(self, job: str, first: int, count: int, holder: Holder) -> None:
        room, free = self.table.room, self.table.free
        indexes = range(first, first + count)
        if count > room or count > free:
            with pytest.raises(PoolFull if count > room else NoFreeSlot):
                self.table.reserve(job, indexes, holder)
            return
        for slot, index in zip(self.table.reserve(job, indexes, holder), indexes, strict=True):
            assert slot not in self.reserved and slot not in self.filling
            self.reserved[slot] = Reserved(job, index, holder)
            self.host[slot] = -next(self.values)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.reserved)))
        what = self.reserved[slot]
        if what.holder is Holder.NOBODY:
            with pytest.raises(SlotError):
                self.table.commit(what.job, [slot], [2], [1], Holder.PEER)
            return
        del self.reserved[slot]
        value = self.host[slot] = next(self.values)
        self.table.commit(what.job, [slot], [2], [value], what.holder)
        self.committed[what.job, what.index] = value

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.reserved)))
        self.table.cancel(self.reserved.pop(slot).job, [slot])

    # --- forgetting ------------------------------------------------------------------------------

    @rule(job=JOBS)
    def release(self, job: str) -> None:
        mine = [s for s, r in self.reserved.items() if r.job == job and r.holder is Holder.WORKER]
        gone = [key for key in self.committed if key[0] == job]
        assert self.table.release(job) == len(mine) + len(gone)
        for slot in mine:
            del self.reserved[slot]
        for slot, what in self.reserved.items():
            if what.job == job:
                self.reserved[slot] = Reserved(job, what.index, Holder.NOBODY)
        for key in gone:
            del self.committed[key]

    @rule()
    def new_life_of_the_worker(self) -> None:
        mine = [slot for slot, r in self.reserved.items() if r.holder is Holder.WORKER]
        assert self.table.drop_reservations() == len(mine)
        for slot in mine:
            del self.reserved[slot]
        self.filling.clear()
        assert self.table.cache.cached == 0

    @rule(really=st.sampled_from([True, *[False] * 9]))
    def lease_ends(self, really: bool) -> None:
        """The files are given up with the table, once nothing moves."""
        if really:
            self.start()

    # --- reading ---------------------------------------------------------------------------------

    @rule(job=JOBS)
    def open_what_is_not_there(self, job: str) -> None:
        with pytest.raises(BlockMissing):
            self.table.find(job, [100])

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        job, index = data.draw(st.sampled_from(sorted(self.committed)))
        [block] = self.table.find(job, [index])
        self.table.pin(block)
        self.readers.append(Reader(block, self.committed[job, index]))
        if block.slot is None:
            if not self.table.free:
                with pytest.raises(NoFreeSlot):
                    self.table.begin_fetch(block)
                return
            self.table.begin_fetch(block)
            assert block.slot is not None
            self.host[block.slot] = -next(self.values)  # half read
            self.moving.append(block)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        reader = self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))
        self.table.unpin(reader.block)

    # --- the prefix cache ------------------------------------------------------------------------

    @rule(most=st.integers(1, 4))
    def fill(self, most: int) -> None:
        room, there = self.table.room, len(self.filling) + self.table.free
        self.filling = self.table.cache.fill(most)
        assert len(self.filling) == min(most, there) and self.table.room == room
        for slot in self.filling:
            assert slot not in self.reserved
            self.host[slot] = -next(self.values)

    @precondition(lambda self: self.filling)
    @rule(keys=st.permutations(KEYS), useless=st.integers(0, 4), count=st.integers(1, 4))
    def keep(self, keys: list[bytes], useless: int, count: int) -> None:
        """The worker has written some of them; in the first ones is nothing of use."""
        slots, self.filling = self.filling[:count], self.filling[count:]
        named = [b"" if n < useless else key for n, key in enumerate(keys[: len(slots)])]
        values = [next(self.values) for _ in slots]
        free = self.table.free
        for slot, value in zip(slots, values, strict=True):
            self.host[slot] = value
        self.table.cache.keep(slots, named, values)
        self.offered.update((k, v) for k, v in zip(named, values, strict=True) if k)
        assert self.table.free >= free + len(slots), "cached slots are room"
        with pytest.raises(SlotError):
            self.table.cache.keep(slots, named, values)

    @rule(keys=st.permutations(KEYS))
    def read_cached(self, keys: list[bytes]) -> None:
        blocks = self.table.cache.pin(keys)
        assert [block.key for block in blocks] == keys[: len(blocks)]
        if blocks:
            self.cache_readers.append(blocks)

    @precondition(lambda self: self.cache_readers)
    @rule(data=st.data(), damaged=st.booleans())
    def close_cached(self, data: st.DataObject, damaged: bool) -> None:
        which = data.draw(st.integers(0, len(self.cache_readers) - 1))
        blocks = self.cache_readers.pop(which)
        if damaged:
            self.table.cache.forget(blocks)
        self.table.cache.unpin(blocks)

    # --- moving ----------------------------------------------------------------------------------

    @rule()
    def begin_spill(self) -> None:
        block = self.table.begin_spill()
        if block is not None:
            assert not block.pins and block.disk_slot is not None
            self.disk[block.disk_slot] = -next(self.values)  # half written
            self.moving.append(block)

    @precondition(lambda self: self.moving)
    @rule(data=st.data(), fine=st.booleans())
    def end_move(self, data: st.DataObject, fine: bool) -> None:
        block = self.moving.pop(data.draw(st.integers(0, len(self.moving) - 1)))
        assert block.slot is not None and block.disk_slot is not None
        if block.move is Move.SPILL:
            self.disk[block.disk_slot] = self.host[block.slot] if fine else -1
            self.table.end_spill(block, fine)
        else:
            self.host[block.slot] = self.disk[block.disk_slot] if fine else -1
            self.table.end_fetch(block, fine)

    @rule(opened=st.booleans())
    def disk_opens_or_closes(self, opened: bool) -> None:
        self.table.disk_open = opened

    # --- judgement -------------------------------------------------------------------------------

    @invariant()
    def agrees_with_the_model(self) -> None:
        table = self.table
        table.check_integrity()
        assert table.reserved == len(self.reserved)
        assert table.committed == len(self.committed)
        for job in "abc":
            found = {index: block.checksum for index, block in table.lookup(job)}
            assert found == {i: v for (owner, i), v in self.committed.items() if owner == job}

    @invariant()
    def what_is_readable_is_right(self) -> None:
        for job in "abc":
            for _, block in self.table.lookup(job):
                if block.readable:
                    assert self.value(block) == block.checksum
                elif block.move is None:
                    assert block.disk_slot is not None
                    assert self.disk[block.disk_slot] == block.checksum
        for reader in self.readers:
            block = reader.block
            if reader.slot is None and block.readable:
                reader.slot = block.slot
            if reader.slot is not None:  # for good, even if the job was released meanwhile
                assert block.slot == reader.slot and self.host[reader.slot] == reader.value

        for key, cached in self.table.cache._blocks.items():
            assert self.host[cached.slot] == cached.checksum == self.offered[key]
        for blocks in self.cache_readers:  # for good, even if taken or replaced meanwhile
            for cached in blocks:
                assert self.host[cached.slot] == cached.checksum

    def value(self, block: Block) -> int:
        assert block.slot is not None
        return self.host[block.slot]


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
