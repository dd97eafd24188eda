"""Free host slots, and what some of them hold as long as nobody needs them: pure bookkeeping.

A cached block is named by its content: whoever begins with the same tokens may read it. Its slot is
free room, taken when no empty one is left, the block that was used longest ago first; so the cache
never costs a job anything. It never goes to the disk.

    fill ──▶ (the worker writes) ──▶ keep ──▶ cached ──▶ taken by others, or read: pin ──▶ unpin

A slot that is being filled or read is not free. That lasts as long as a copy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastserve.kv_offload.errors import SlotError
from fastserve.kv_offload.free_slots import FreeSlots


@dataclass(slots=True, eq=False)
class CachedBlock:
    """A full block of the cache. checksum: xxh3_64. forgotten: only its readers know it still."""

    key: bytes
    slot: int
    checksum: int
    pins: int = 0
    forgotten: bool = False


class CachedSlots:
    """Slots 0 .. count-1, all free and empty at first."""

    def __init__(self, count: int) -> None:
        self._empty = FreeSlots(count)
        self._filling: set[int] = set()
        self._blocks: dict[bytes, CachedBlock] = {}
        self._unread: OrderedDict[CachedBlock, None] = OrderedDict()  # the oldest use first
        self._read: set[CachedBlock] = set()  # pinned, forgotten or not

    # --- room ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Slots that can be taken."""
        return len(self._empty) + len(self._unread)

    def take(self, count: int) -> list[int]:
        """`count` slots. The caller has checked that there are so many."""
        for _ in range(count - len(self._empty)):
            self._drop(next(iter(self._unread)))
        return self._empty.take(count)

    def give_back(self, slots: Iterable[int]) -> None:
        self._empty.give_back(slots)

    # --- the cache -------------------------------------------------------------------------------

    @property
    def cached(self) -> int:
        """Blocks that can be read."""
        return len(self._blocks)

    @property
    def busy(self) -> int:
        """Slots that are free as soon as copies under way have ended."""
        return len(self._filling) + len(self._read)

    def fill(self, most: int) -> list[int]:
        """Slots for at most so many blocks of the cache. One batch at a time: what was not kept of
        the one before is free."""
        self.give_back(self._filling)
        slots = self.take(min(most, len(self)))
        self._filling = set(slots)
        return slots

    def keep(self, slots: Sequence[int], keys: Sequence[bytes], checksums: Sequence[int]) -> None:
        """These slots have been written; with an empty key what was written is of no use. A block
        that has the same key already is replaced.

        Raises `SlotError` if a slot is not being filled.
        """
        if not len(slots) == len(keys) == len(checksums) == len(set(slots)):
            raise SlotError("slots, keys and checksums differ in length, or a slot comes twice")
        if not self._filling.issuperset(slots):
            raise SlotError("a slot is not reserved for the cache")
        self._filling.difference_update(slots)
        # The beginning of a text is of more use than what follows: it shall go last.
        for slot, key, checksum in reversed(list(zip(slots, keys, checksums, strict=True))):
            if not key:
                self.give_back([slot])
                continue
            if key in self._blocks:
                self._drop(self._blocks[key])
            block = self._blocks[key] = CachedBlock(key, slot, checksum)
            self._unread[block] = None

    def pin(self, keys: Iterable[bytes]) -> list[CachedBlock]:
        """The longest run of blocks from the first key on, to be read."""
        run = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            block.pins += 1
            self._unread.pop(block, None)
            self._read.add(block)
            run.append(block)
        return run

    def unpin(self, blocks: Sequence[CachedBlock]) -> None:
        """They have been read, and are the ones used last."""
        for block in reversed(blocks):
            block.pins -= 1
            if block.pins:
                continue
            self._read.discard(block)
            if block.forgotten:
                self.give_back([block.slot])
            else:
                self._unread[block] = None

    def forget(self, blocks: Iterable[CachedBlock]) -> None:
        """They are not what they should be."""
        for block in blocks:
            if not block.forgotten:
                self._drop(block)

    def clear(self) -> None:
        """Nobody knows the keys any more."""
        self.give_back(self._filling)
        self._filling.clear()
        self.forget(list(self._blocks.values()))

    def _drop(self, block: CachedBlock) -> None:
        del self._blocks[block.key]
        block.forgotten = True
        if not block.pins:
            del self._unread[block]
            self.give_back([block.slot])

    def all_slots(self) -> list[int]:
        """Every slot that was not taken. Raises AssertionError if a block is in no place or two."""
        if {b for b in self._blocks.values() if not b.pins} != set(self._unread):
            raise AssertionError("a cached block is lost")
        if any(block.pins < 1 for block in self._read):
            raise AssertionError("nobody reads a block that is kept for its readers")
        blocks = [*self._unread, *self._read]
        return [*self._empty, *self._filling, *(block.slot for block in blocks)]
