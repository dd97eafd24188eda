"""Ends this process soon after any rank of its group is lost, whatever it is waiting in.

Every rank counts up in the store that rank 0 keeps (TCP, so one host or several) and looks at the
counts of the others. A rank that is killed or stopped counts no more; if it is rank 0, the store
does not answer.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import structlog
from torch._C._distributed_c10d import Store

from fastserve.worker.parallel.groups import Group

log = structlog.get_logger(__name__)
_BEAT_S = 0.25
LOST_S = 2.0  # without a beat


def lost(reason: str) -> None:
    """End this process at once."""
    log.error("the group is lost", reason=reason)
    os._exit(1)  # other threads may hang in a collective


class Watchdog:
    """Two threads: one talks to the store and may hang in it, the other measures that."""

    def __init__(
        self,
        store: Store,
        group: Group,
        lost: Callable[[str], None] = lost,
        *,
        lost_s: float = LOST_S,
    ) -> None:
        """lost: called once, in a thread, with the reason."""
        self._store, self._group, self._lost, self._lost_s = store, group, lost, lost_s
        self._stopped = threading.Event()
        self._answered = time.monotonic()
        for target in (self._beat, self._measure):
            threading.Thread(target=target, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """The group ends in order: losses no longer matter."""
        self._stopped.set()

    def _report(self, reason: str) -> None:
        if not self._stopped.is_set():
            self._stopped.set()
            self._lost(reason)

    def _beat(self) -> None:
        started = time.monotonic()
        seen = {rank: (0, started) for rank in range(self._group.size) if rank != self._group.rank}
        while not self._stopped.wait(_BEAT_S):
            try:
                self._store.add(f"beat/{self._group.rank}", 1)
                counts = {rank: self._store.add(f"beat/{rank}", 0) for rank in seen}
            except RuntimeError as error:  # torch.distributed's errors are of this kind
                self._report(f"the store of rank 0 is gone: {error}")
                return
            now = time.monotonic()
            if now - self._answered > self._lost_s:
                # This process itself was stopped for a while, so the others' silence is no sign.
                seen = {rank: (count, now) for rank, (count, _) in seen.items()}
            self._answered = now
            for rank, count in counts.items():
                last, when = seen[rank]
                if count != last:
                    seen[rank] = (count, now)
                # A rank that has not begun yet has the time of the rendezvous.
                elif last and now - when > self._lost_s:
                    self._report(f"rank {rank} has been silent for {now - when:.1f} s")
                    return

    def _measure(self) -> None:
        before = time.monotonic()
        silent = 0.0
        while not self._stopped.wait(_BEAT_S):
            now = time.monotonic()
            # Time in which this thread did not run either says nothing about the store.
            silent = silent + min(now - before, 2 * _BEAT_S) if self._answered < before else 0.0
            before = now
            if silent > self._lost_s:
                self._report(f"the store of rank 0 has not answered for {silent:.1f} s")
