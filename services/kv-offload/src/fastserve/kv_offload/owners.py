"""Who owns blocks: workers, each with tiers of its own, for as long as its lease runs.

A pool file belongs to one owner. When the lease ends or the layout changes, the file is given up
whole and the next owner gets a new one: a worker that was only paused writes into its old mapping,
where nobody looks.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog

from fastserve.common.errors import StartupError
from fastserve.kv_offload.disk import DiskFile, DiskRegion
from fastserve.kv_offload.errors import NotHere, PoolFull, SlotError, StaleCall
from fastserve.kv_offload.metrics import Metrics
from fastserve.kv_offload.pool import Pool, slot_bytes
from fastserve.kv_offload.settings import Settings, parse_size
from fastserve.kv_offload.tiers import Tiers

log = structlog.get_logger(__name__)
_ALIVE_S = 2.5


@dataclass(frozen=True, slots=True)
class Layout:
    """What a worker's blocks are. meaning: fingerprint of model, dtype and order of the bytes."""

    meaning: str
    block_bytes: int
    block_size: int


@dataclass(slots=True, eq=False)
class Owner:
    """A worker and its blocks. epoch: of this pool; worker_epoch: of the worker's life."""

    worker_id: str
    layout: Layout
    part: int
    tiers: Tiers
    epoch: int
    worker_epoch: int
    seen: float
    renewed: float = -math.inf  # the last Renew, which a process that lives sends every second


class Owners:
    """All owners. `--workers` equal parts of memory and disk are given out."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        disk: DiskFile | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._metrics, self._disk, self._clock = settings, metrics, disk, clock
        self._owners: dict[str, Owner] = {}
        self._parts = list(range(settings.workers - 1, -1, -1))
        self._changing = asyncio.Lock()
        metrics.watch(lambda: [owner.tiers.table for owner in list(self._owners.values())])

    def __iter__(self) -> Iterator[Owner]:
        return iter(list(self._owners.values()))

    async def attach(self, worker_id: str, worker_epoch: int, layout: Layout) -> Owner:
        """The owner for this life of the worker; what an earlier life committed is kept.

        Raises `StaleCall` if a later life is attached, `SlotError` if not one block fits,
        `PoolFull` if there is no part left or the file system is full.
        """
        async with self._changing:
            owner = self._owners.get(worker_id)
            if owner is not None and worker_epoch < owner.worker_epoch:
                raise StaleCall("a later life of this worker is attached")
            if owner is not None and owner.layout != layout:
                log.warning("another layout: the pool is emptied", worker=worker_id)
                await self._give_up(owner)
                owner = None
            if owner is None:
                owner = self._create(worker_id, worker_epoch, layout)
            elif worker_epoch > owner.worker_epoch:
                freed = owner.tiers.table.drop_reservations()
                owner.tiers.changed()
                log.info("worker attached again", worker=worker_id, freed_slots=freed)
            owner.worker_epoch = worker_epoch
            self.touch(owner)
            return owner

    def _create(self, worker_id: str, worker_epoch: int, layout: Layout) -> Owner:
        settings, size = self._settings, slot_bytes(layout.block_bytes)
        memory = parse_size(settings.host_memory) // settings.workers
        slots = settings.host_blocks or memory // size
        if slots == 0:
            raise SlotError(
                f"a block of {size} bytes does not fit into --host-memory {settings.host_memory}"
            )
        if not self._parts:
            others = ", ".join(self._owners)
            raise PoolFull(f"all memory belongs to {others}: see --workers and --owner-lease")
        try:
            pool = Pool(settings.pool_dir, slots * size)
        except StartupError as error:
            raise PoolFull(str(error)) from error
        part, region = self._parts.pop(), None
        if self._disk is not None:
            share = self._disk.size // settings.workers
            region = DiskRegion(self._disk, part * share, share, size)
        tiers = Tiers(pool, slots, layout.block_size, layout.block_bytes, region, self._metrics)
        owner = Owner(worker_id, layout, part, tiers, time.time_ns(), worker_epoch, 0.0)
        self._owners[worker_id] = owner
        log.info(
            "pool created",
            worker=worker_id,
            slots=slots,
            bytes=pool.size,
            huge_pages=pool.huge_pages,
            disk_slots=tiers.table.disk_slots,
        )
        return owner

    def caller(self, worker_id: str, worker_epoch: int, epoch: int) -> Owner:
        """The owner that calls; its lease begins anew. Raises `StaleCall` for a past life."""
        owner = self._owners.get(worker_id)
        if owner is None:
            raise StaleCall(f"worker {worker_id!r} is not attached")
        if epoch != owner.epoch:
            raise StaleCall("the sidecar was restarted or its pool replaced")
        if worker_epoch != owner.worker_epoch:
            raise StaleCall("another life of this worker is attached")
        self.touch(owner)
        return owner

    def touch(self, owner: Owner) -> None:
        """The owner has been heard of."""
        owner.seen = self._clock()

    def renew(self, owner: Owner) -> None:
        """Its process lives."""
        owner.renewed = self._clock()

    def detach(self, owner: Owner) -> None:
        """Its process is about to end; its blocks stay."""
        owner.renewed = -math.inf

    @property
    def in_use(self) -> bool:
        """Whether the process of any owner lives, as far as anybody can tell."""
        now = self._clock()
        return any(now - owner.renewed < _ALIVE_S for owner in self)

    def named(self, worker_id: str) -> Owner:
        """The owner of that name. Raises `NotHere`."""
        if worker_id not in self._owners:
            raise NotHere(f"no worker {worker_id!r} is attached here")
        return self._owners[worker_id]

    def holds(self, owner: Owner) -> bool:
        """Whether it still is an owner."""
        return self._owners.get(owner.worker_id) is owner

    async def collect(self) -> None:
        """Free everything of owners that have not called for the time of a lease."""
        async with self._changing:
            now = self._clock()
            for owner in list(self._owners.values()):
                if now - owner.seen > self._settings.owner_lease:
                    jobs = len(owner.tiers.table.jobs)
                    log.warning("a worker did not come back", worker=owner.worker_id, jobs=jobs)
                    self._metrics.failed("lease_expired")
                    await self._give_up(owner)

    async def close(self) -> None:
        """Give up all pools."""
        async with self._changing:
            for owner in list(self._owners.values()):
                await self._give_up(owner)

    async def _give_up(self, owner: Owner) -> None:
        del self._owners[owner.worker_id]
        await owner.tiers.close()  # its part of the disk is nobody else's while it is written
        self._parts.append(owner.part)
