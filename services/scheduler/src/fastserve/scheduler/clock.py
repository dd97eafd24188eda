"""The one clock of the process: the core's monotonic seconds and wall time at the edges."""

from __future__ import annotations

import time


class Clock:
    """Core time is monotonic; unix time appears in messages, Redis and traces only."""

    def now(self) -> float:
        """Seconds, monotonic, from an arbitrary start."""
        return time.monotonic()

    def unix(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def to_unix(self, now: float) -> float:
        """Wall time of a core time. The wall clock may be set: convert late, store no offset."""
        return self.unix() - (self.now() - now)

    def from_unix(self, unix: float) -> float:
        """Core time of a wall time."""
        return self.now() - (self.unix() - unix)
