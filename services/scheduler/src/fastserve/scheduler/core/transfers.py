"""What the memory of a worker group is measured by: copies, and blocks that newcomers take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

# Weight of the past per copy, and how long a newcomer is remembered.
_FORGET: Final = 0.9
_MEMORY_S: Final = 10.0


@dataclass(slots=True)
class Transfers:
    """Copies in one direction, which go through it one after the other.

    pending: blocks of those under way.
    """

    pending: int = 0
    _copies: float = 0.0
    _blocks: float = 0.0
    _seconds: float = 0.0
    _busy_until: float = 0.0  # the last copy ended then

    @property
    def block_s(self) -> float:
        """Measured seconds per block; 0 until the first copy has ended."""
        return self._seconds / self._blocks if self._blocks else 0.0

    @property
    def usual(self) -> float:
        """Blocks of an average copy; 0 until the first has ended."""
        return self._blocks / self._copies if self._copies else 0.0

    def seconds(self, blocks: float) -> float:
        """Until so many blocks more are over, those under way included."""
        return (self.pending + blocks) * self.block_s

    def end(self, began: float, seconds: float, blocks: int) -> None:
        """A copy of so many blocks ended, `seconds` after it was asked for; 0: nothing was copied.

        While others were ahead of it, it waited: only the rest is what it took.
        """
        self.pending -= blocks
        if seconds <= 0 or not blocks:
            return
        ended = began + seconds
        took = max(0.0, ended - max(began, self._busy_until))
        self._busy_until = max(self._busy_until, ended)
        self._copies = _FORGET * self._copies + 1
        self._blocks = _FORGET * self._blocks + blocks
        self._seconds = _FORGET * self._seconds + took


@dataclass(slots=True)
class Newcomers:
    """How fast newcomers take blocks: means over the last seconds, the newest counting most."""

    _per_s: float = 0.0
    _squares_per_s: float = 0.0  # of the blocks that each took at once
    _at: float = 0.0

    def note(self, blocks: int, now: float) -> None:
        """One was let in, and took so many at once."""
        self._fade(now)
        self._per_s += blocks / _MEMORY_S
        self._squares_per_s += blocks * blocks / _MEMORY_S

    def blocks_per_s(self, now: float) -> float:
        """What all of them took."""
        self._fade(now)
        return self._per_s

    def most(self, seconds: float, now: float) -> float:
        """Blocks that they will hardly exceed within so many seconds from now.

        Mean and two standard deviations, if they come independently of each other.
        """
        self._fade(now)
        return self._per_s * seconds + 2 * math.sqrt(self._squares_per_s * seconds)

    def _fade(self, now: float) -> None:
        left = math.exp(min(0.0, self._at - now) / _MEMORY_S)
        self._per_s *= left
        self._squares_per_s *= left
        self._at = now
