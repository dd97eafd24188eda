"""Which slot of the pool holds which KV block: pure bookkeeping, no I/O.

A slot is free, reserved (the worker may be writing it) or committed (readable). Blocks are named by
(job id, block index). The worker that owns the pool orders its own calls: it never releases a job
while one of its copies is under way, so a freed slot may be handed out at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


class SlotError(ValueError):
    """The call makes no sense in the present state; nothing was changed."""


class PoolFull(SlotError):
    """Not enough free slots; nothing was reserved."""


@dataclass(frozen=True, slots=True)
class Block:
    """A committed block: where it is, how many tokens are valid, and its xxh3_64."""

    slot: int
    valid_tokens: int
    checksum: int


@dataclass(slots=True)
class JobSlots:
    """Slots of one job, by block index."""

    committed: dict[int, Block] = field(default_factory=dict)
    reserved: dict[int, int] = field(default_factory=dict)  # slot -> block index


class SlotTable:
    """State of `slots` slots, each for one block of `block_size` tokens."""

    def __init__(self, slots: int, block_size: int) -> None:
        self.slots = slots
        self.block_size = block_size
        # Highest first, so that pop() hands out low slots and a small load touches little memory.
        self._free = list(range(slots - 1, -1, -1))
        self._jobs: dict[str, JobSlots] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def reserved(self) -> int:
        return sum(len(job.reserved) for job in self._jobs.values())

    @property
    def committed(self) -> int:
        return sum(len(job.committed) for job in self._jobs.values())

    @property
    def jobs(self) -> list[str]:
        return list(self._jobs)

    def reserve(self, job_id: str, block_indexes: Sequence[int]) -> list[int]:
        """One free slot per block index, all or nothing.

        Raises `SlotError` for an index named twice, `PoolFull` when there are too few slots.
        """
        if len(set(block_indexes)) != len(block_indexes):
            raise SlotError(f"job {job_id}: a block index is named twice")
        if len(block_indexes) > len(self._free):
            raise PoolFull(f"{len(block_indexes)} slots wanted, {len(self._free)} free")
        job = self._jobs.setdefault(job_id, JobSlots())
        taken = [self._free.pop() for _ in block_indexes]
        job.reserved.update(zip(taken, block_indexes, strict=True))
        return taken

    def commit(
        self,
        job_id: str,
        slots: Sequence[int],
        valid_tokens: Sequence[int],
        checksums: Sequence[int],
    ) -> None:
        """Make reserved slots readable; an older commit of the same block is replaced and freed.

        Raises `SlotError` if a slot is not reserved for the job, or a count is out of range.
        """
        if not len(slots) == len(valid_tokens) == len(checksums):
            raise SlotError("slots, valid_tokens and checksums differ in length")
        if len(set(slots)) != len(slots):
            raise SlotError(f"job {job_id}: a slot is named twice")
        job = self._jobs.get(job_id, JobSlots())
        for slot, count in zip(slots, valid_tokens, strict=True):
            if slot not in job.reserved:
                raise SlotError(f"slot {slot} is not reserved for job {job_id}")
            if not 1 <= count <= self.block_size:
                raise SlotError(f"{count} valid tokens in a block of {self.block_size}")
        for slot, count, checksum in zip(slots, valid_tokens, checksums, strict=True):
            index = job.reserved.pop(slot)
            old = job.committed.get(index)
            if old is not None:
                self._free.append(old.slot)
            job.committed[index] = Block(slot, count, checksum)

    def lookup(self, job_id: str) -> list[tuple[int, Block]]:
        """Committed blocks of a job by ascending index; empty for an unknown job."""
        job = self._jobs.get(job_id)
        return sorted(job.committed.items()) if job is not None else []

    def release(self, job_id: str) -> int:
        """Forget a job; how many slots that freed (0 for an unknown job)."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return 0
        freed = [*job.reserved, *(block.slot for block in job.committed.values())]
        self._free.extend(freed)
        return len(freed)

    def drop_reservations(self) -> int:
        """Free what a past life of the worker reserved and never committed; how many slots."""
        freed = 0
        for job_id, job in list(self._jobs.items()):
            self._free.extend(job.reserved)
            freed += len(job.reserved)
            job.reserved.clear()
            if not job.committed:
                del self._jobs[job_id]
        return freed

    def check_integrity(self) -> None:
        """Raise AssertionError unless every slot is in exactly one place."""
        places = list(self._free)
        for job in self._jobs.values():
            places += job.reserved
            places += [block.slot for block in job.committed.values()]
        if sorted(places) != list(range(self.slots)):
            raise AssertionError("a slot is lost or in two places")
