"""Which device blocks are free: pure bookkeeping."""

from __future__ import annotations

from collections.abc import Iterable


class NoFreeBlock(Exception):
    """The pool cannot give that many blocks; nothing was taken."""


class BlockPool:
    """Blocks 0 .. count-1. Taking and giving back is O(1) per block; a double free is an error."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._is_free = bytearray(b"\x01" * count)

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks; raises `NoFreeBlock` if there are fewer."""
        if count > len(self._free):
            raise NoFreeBlock(f"{count} blocks wanted, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._is_free[block] = 0
        return taken

    def give_back(self, blocks: Iterable[int]) -> None:
        """Free blocks; raises ValueError for one that is free already."""
        for block in blocks:
            if self._is_free[block]:
                raise ValueError(f"block {block} is freed twice")
            self._is_free[block] = 1
            self._free.append(block)
