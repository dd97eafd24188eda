"""The free slots of a file: the lowest are handed out first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator


class FreeSlots:
    """Slots 0 .. count-1, all free at first.

    Lowest first: a small load touches little memory, and slots taken together mostly lie together.
    """

    def __init__(self, count: int) -> None:
        self._heap = list(range(count))

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[int]:
        return iter(self._heap)

    def take(self, count: int) -> list[int]:
        """`count` slots, ascending. The caller has checked that there are so many."""
        return [heapq.heappop(self._heap) for _ in range(count)]

    def give_back(self, slots: Iterable[int]) -> None:
        for slot in slots:
            heapq.heappush(self._heap, slot)
