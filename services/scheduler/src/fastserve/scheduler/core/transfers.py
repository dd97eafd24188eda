"""What the memory of a worker group is measured by: copies, and blocks that newcomers take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

# Iterations may get so much slower by copies that nobody waits for.
_SLOWER: Final = 0.02
# Copies that nobody waits for take at most this share of the time, so that iterations without any
# are always there to compare with.
_LARGEST_SHARE: Final = 0.25
_SAVED_S: Final = 4.0
# Weight of the newest iteration in the means of `Pace`, and what one of them changes.
_NEWEST: Final = 0.02
_STEP: Final = 1.02
# Weight of the past per copy, and how long a newcomer is remembered.
_FORGET: Final = 0.95
_MEMORY_S: Final = 10.0


@dataclass(slots=True)
class Transfers:
    """Copies in one direction, which go through it one after the other.

    A copy takes some time whatever its size, and more for each block: the line through those that
    were seen, by least squares, the newest counting most. Copies of one size say nothing of the
    first part, which is taken to be nothing then.

    pending: blocks of those under way.
    """

    pending: int = 0
    _copies: float = 0.0
    _blocks: float = 0.0
    _seconds: float = 0.0
    _squares: float = 0.0  # of the blocks
    _products: float = 0.0  # of blocks and seconds
    _busy_until: float = 0.0  # the last copy ended then

    @property
    def block_s(self) -> float:
        """Measured seconds that one block more takes; 0 until the first copy has ended."""
        if not self._blocks:
            return 0.0
        mean = self._seconds / self._blocks
        spread = self._copies * self._squares - self._blocks * self._blocks
        if spread <= 0.01 * self._copies * self._squares:
            return mean
        slope = (self._copies * self._products - self._blocks * self._seconds) / spread
        return min(max(slope, 0.1 * mean), mean)

    @property
    def fixed_s(self) -> float:
        """Measured seconds that a copy takes beside those of its blocks."""
        if not self._copies:
            return 0.0
        return max(0.0, self._seconds - self.block_s * self._blocks) / self._copies

    @property
    def usual(self) -> float:
        """Blocks of an average copy; 0 until the first has ended."""
        return self._blocks / self._copies if self._copies else 0.0

    def seconds(self, blocks: float) -> float:
        """Until so many blocks more are over, those under way included."""
        return self.alone(self.pending + blocks)

    def alone(self, blocks: float) -> float:
        """What a copy of so many blocks takes when nothing is ahead of it."""
        return self.fixed_s + blocks * self.block_s

    def most(self, seconds: float) -> int:
        """Blocks of a copy that takes so long at most; 1 as long as nothing is known."""
        if not self.block_s:
            return 1 if seconds > 0 else 0
        return max(0, int((seconds - self.fixed_s) / self.block_s))

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
        self._squares = _FORGET * self._squares + blocks * blocks
        self._products = _FORGET * self._products + blocks * took


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
        self.share = min(_LARGEST_SHARE, max(_SLOWER, self.share * step))

    def budget_s(self, now: float) -> float:
        """Seconds that copies may take which begin now: the share of the time since the last ones
        began, of some seconds at the most."""
        return self.share * min(now - self._since, _SAVED_S)

    def begin(self, copies: int, now: float) -> None:
        """So many copies begin now."""
        self.copies += copies
        self._since = now
