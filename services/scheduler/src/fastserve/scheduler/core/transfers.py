"""What the memory of a worker group is measured by: copies, and blocks that newcomers take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

# Iterations may get so much slower by copies that nobody waits for.
_SLOWER: Final = 0.02
# Weight of the newest iteration in the means of `Pace`, and what one of them changes.
_NEWEST: Final = 0.02
_STEP: Final = 1.02
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


@dataclass(slots=True)
class Pace:
    """How fast blocks may be copied out for which nobody waits, without slowing iterations.

    Copying takes a share of the time. It begins with what does no harm even where a copy makes
    iterations longer by as much as it lasts, and grows as long as iterations with copies take
    hardly more than those without, each against what the cost model expects.

    counts: iterations are compared, which is only needed where something is copied. copies: those
    under way.
    """

    counts: bool = False
    copies: int = 0
    share: float = _SLOWER
    _since: float = 0.0
    _with: float = 1.0
    _without: float = 1.0

    def observe(self, seconds: float, expected: float) -> None:
        """An iteration took so long."""
        if expected <= 0:
            return
        ratio = min(seconds / expected, 2.0)
        if not self.copies:
            self._without += _NEWEST * (ratio - self._without)
            return
        self._with += _NEWEST * (ratio - self._with)
        step = _STEP if self._with <= (1 + _SLOWER) * self._without else 1 / _STEP
        self.share = min(1.0, max(_SLOWER, self.share * step))

    def blocks(self, block_s: float, now: float) -> int:
        """That may be copied now, `block_s` seconds each: for the time since this was last asked.

        0 is asked for again later, with the time since then.
        """
        if not block_s:  # how long a block takes is not known yet
            return 1
        blocks = int(self.share * min(now - self._since, 1.0) / block_s)
        if blocks:
            self._since = now
        return blocks
