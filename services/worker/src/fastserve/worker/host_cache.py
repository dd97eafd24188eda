"""The prefix cache behind the device: full blocks are copied to the host ahead of need, and jobs
that begin take them from there.

All is part of the engine, no copy holds it up:

- A block that is being copied out may be taken by anybody meanwhile; then the copy is not kept.
- A job that begins with blocks from the host has no row until they have come. Its blocks are its
  own from the beginning, and operations on it wait, as for any other copy.

What the host has is known to the sidecar alone, which may need the room at any time. `_known` is a
guess that saves asking in vain; a wrong one costs a question.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from fastserve.worker.block_pool import BlockPool, NoFreeBlock
from fastserve.worker.job import Job, OpStatus
from fastserve.worker.kv_ops import CopyDone, KvOps
from fastserve.worker.staging.types import Copied

# Blocks in a copy out beside iterations: at least that share of the device, since a copy costs as
# much for calls as for bytes, and what became full last is given up last; at most so many, for
# copies of jobs wait.
_SHARE = 16
_BATCH = 32


class CacheMover(Protocol):
    """Copies blocks of the cache; `done` is called as for `KvMover`.

    caches: whether there is a host at all. cached_blocks: in the cache there, at the last save.
    """

    @property
    def generation(self) -> int: ...

    @property
    def caches(self) -> bool: ...

    @property
    def cached_blocks(self) -> int: ...

    def save(
        self, blocks: Sequence[int], intact: Callable[[], Sequence[bytes]], done: CopyDone
    ) -> None:
        """Copy out as many blocks as the host has room for, then keep those for which `intact`
        gives a key. It is called after the copy, on any thread."""

    def fetch(self, keys: Sequence[bytes], blocks: Sequence[int], done: CopyDone) -> None:
        """Copy in the longest run that the host has. The other blocks hold nothing of use."""


class HostCache:
    """Decides what goes to the host and what comes from there."""

    def __init__(self, pool: BlockPool, block_size: int, ops: KvOps, mover: CacheMover) -> None:
        self._pool, self._block_size, self._ops, self._mover = pool, block_size, ops, mover
        self._known: OrderedDict[bytes, None] = OrderedDict()  # the oldest use first
        self._generation = 0  # life of the sidecar that has them
        self._saving = False
        self._spoilt = False  # something was forgotten during the copy under way

    def save(self, *, idle: bool) -> None:
        """Start to copy out a batch that the host has not, once half of the device is in use. idle:
        nothing else runs, so a single block is worth a copy."""
        pool = self._pool
        if self._saving or not self._mover.caches or 2 * pool.blank > pool.count:
            return
        if not idle and pool.unsaved < min(_BATCH, pool.count // _SHARE):
            return
        self._notice_loss()
        blocks = pool.begin_save(_BATCH, self._known)
        if not blocks:
            return
        kept: list[bytes] = []

        def intact() -> list[bytes]:
            keys = pool.still_saving(blocks)
            kept[:] = [key for key in keys if key]
            return keys

        def done(status: OpStatus, copied: Copied) -> None:
            self._saving = False
            pool.end_save(blocks)
            self._notice_loss()
            if status is OpStatus.OK and not self._spoilt:
                self._know(kept)

        self._saving, self._spoilt = True, False
        self._mover.save(blocks, intact, done)

    def fetch(self, job: Job, keys: Iterable[bytes]) -> None:
        """Start to bring what the host has of a job that begins, behind what the device has."""
        if not self._known:
            return
        self._notice_loss()
        keys, pool = list(keys), self._pool
        first = pool.known(keys)
        wanted = self._run(keys[first:])
        if not wanted:
            return
        shared = pool.share(keys[:first])
        try:
            fresh = pool.take(len(wanted))
        except NoFreeBlock:
            pool.give_back(shared)
            return

        def done(status: OpStatus, copied: Copied) -> None:
            came = copied.tokens // self._block_size
            if status is not OpStatus.OK:
                came = 0
                self._known.clear()  # there is something wrong: nobody asks before the next save
            self._fetched(job, first, wanted, came)

        job.blocks, job.fetching = shared + fresh, True
        job.registered, job.computed = first, first * self._block_size
        self._ops.fence(job, lambda end: self._mover.fetch(wanted, fresh, end), done)

    def forget(self, keys: Iterable[bytes]) -> None:
        """What has these keys is not to be used again."""
        self._spoilt = True
        for key in keys:
            self._known.pop(key, None)

    def _fetched(self, job: Job, first: int, wanted: Sequence[bytes], came: int) -> None:
        pool, end = self._pool, first + came
        pool.give_back(job.blocks[end:])
        del job.blocks[end:]
        for block, key in zip(job.blocks[first:], wanted, strict=False):
            pool.register(block, key, saved=True)
        job.fetching = False
        job.registered, job.computed = end, end * self._block_size
        job.found = (first * self._block_size, came * self._block_size)
        self._notice_loss()
        for key in wanted[came:]:
            self._known.pop(key, None)
        self._know(wanted[:came])

    def _run(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Those from the first on that the host should have."""
        count = 0
        while count < len(keys) and keys[count] in self._known:
            count += 1
        return keys[:count]

    def _know(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > self._mover.cached_blocks:
            self._known.popitem(last=False)

    def _notice_loss(self) -> None:
        """A new life of the sidecar has nothing, and gets everything again."""
        generation = self._mover.generation
        if generation and generation != self._generation:
            self._generation = generation
            self._known.clear()
            self._pool.unsave()
