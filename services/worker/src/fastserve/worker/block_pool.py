"""Which device blocks are free, who shares them, and what the cached ones hold: pure bookkeeping.

A block with content that may be used again has a key. It is shared while jobs hold it; once nobody
does it counts as free and keeps its content until it is the least recently used one and a block is
needed. So the cache never takes anything from a job. Content that was not copied to the host yet is
unsaved; while a copy is made its block may be taken nevertheless, and the copy is of no use then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence


class NoFreeBlock(Exception):
    """The pool cannot give that many blocks; nothing was taken."""


class BlockPool:
    """Blocks 0 .. count-1. All is O(1) per block; a double free is an error."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._blank = list(range(count - 1, -1, -1))  # free, with nothing to be kept
        self._kept: OrderedDict[int, None] = OrderedDict()  # free, the least recently used first
        self._holders = [0] * count
        self._keys: list[bytes | None] = [None] * count
        self._by_key: dict[bytes, int] = {}
        self._unsaved: OrderedDict[int, None] = OrderedDict()  # that have a key; the oldest first
        self._saving: dict[int, bytes] = {}  # their keys; other threads look things up in here

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._blank) + len(self._kept)

    @property
    def blank(self) -> int:
        """Of them, those with nothing to be kept."""
        return len(self._blank)

    @property
    def kept(self) -> int:
        """Of them, those whose content can be used again."""
        return len(self._kept)

    def take(self, count: int) -> list[int]:
        """`count` blocks to write to; raises `NoFreeBlock` if there are fewer."""
        if count > self.free:
            raise NoFreeBlock(f"{count} blocks wanted, {self.free} free")
        taken = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._kept.popitem(last=False)
                self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        """Somebody holds them no more; raises ValueError for one that nobody holds.

        Of a sequence the last ones go first when room is made: without the first ones they are of
        no use.
        """
        for block in reversed(blocks):
            if not self._holders[block]:
                raise ValueError(f"block {block} is freed twice")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._keys[block] is None:
                self._blank.append(block)
            else:
                self._kept[block] = None

    # --- content -----------------------------------------------------------------------------

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest run of keys that are known, held once more; only to be read."""
        shared = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            self._kept.pop(block, None)
            self._holders[block] += 1
            shared.append(block)
        return shared

    def known(self, keys: Iterable[bytes]) -> int:
        """How many `share` would give."""
        count = 0
        for key in keys:
            if key not in self._by_key:
                break
            count += 1
        return count

    def register(self, block: int, key: bytes, *, saved: bool = False) -> None:
        """A held block has its final content, which nobody may change from now on.

        Nothing happens if there is a block with that content already. saved: the host has it.
        """
        if self._keys[block] is None and key not in self._by_key:
            self._keys[block] = key
            self._by_key[key] = block
            if not saved:
                self._unsaved[block] = None

    def shared(self, block: int) -> bool:
        """Whether others than its holder read it, or may come to: it must not be changed."""
        return self._keys[block] is not None or self._holders[block] > 1

    def forget(self, blocks: Iterable[int]) -> None:
        """What these held blocks hold is not to be used again."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            self._keys[block] = None
            del self._by_key[key]
            self._unsaved.pop(block, None)
            self._saving.pop(block, None)

    # --- copies to the host ------------------------------------------------------------------

    @property
    def unsaved(self) -> int:
        """Blocks whose content the host may lack."""
        return len(self._unsaved)

    def begin_save(self, most: int, saved: Container[bytes]) -> list[int]:
        """At most so many unsaved blocks, the oldest first, of which a copy begins; without those
        whose keys are among `saved`."""
        blocks: list[int] = []
        while self._unsaved and len(blocks) < most:
            block, _ = self._unsaved.popitem(last=False)
            key = self._keys[block]
            assert key is not None
            if key not in saved:
                self._saving[block] = key
                blocks.append(block)
        return blocks

    def still_saving(self, blocks: Sequence[int]) -> list[bytes]:
        """The keys of these blocks, b"" for one whose content is there no more: what was copied
        until now is to be trusted or not. May be called on any thread."""
        return [self._saving.get(block, b"") for block in blocks]

    def end_save(self, blocks: Iterable[int]) -> None:
        """The copy of these blocks is over."""
        for block in blocks:
            self._saving.pop(block, None)

    def unsave(self) -> None:
        """The host has nothing any more."""
        self._unsaved = OrderedDict.fromkeys(self._by_key.values())
