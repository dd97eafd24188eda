"""KV operations: what they do to a job, in which order, and when blocks become free.

Operations on one job run one after the other. While a copy is under way (`job.copying`) the blocks
it reads or writes stay with the job, so nothing can reuse them early.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from fastserve.worker.block_pool import BlockPool, NoFreeBlock
from fastserve.worker.job import Job, Op, OpKind, OpResult, OpStatus
from fastserve.worker.staging.types import BlockRef, Copied, Place

CopyDone = Callable[[OpStatus, Copied], None]


class KvMover(Protocol):
    """Starts a copy, and calls `done` with the engine's lock once it is over.

    generation: life of the sidecar; a change means that what it held is lost.
    """

    @property
    def generation(self) -> int: ...

    def store(self, job_id: str, blocks: Sequence[BlockRef], done: CopyDone) -> None: ...

    def load(self, job_id: str, blocks: Sequence[int], done: CopyDone) -> None: ...

    def release(self, job_id: str, done: CopyDone) -> None: ...

    def export(self, job_id: str, blocks: Sequence[BlockRef], to: Place, done: CopyDone) -> None:
        """`store`, then send all that is on the host. `Copied.tokens`: of what was stored, which
        may have gone well when the sending did not."""


class KvOps:
    """Runs the operations of all jobs."""

    def __init__(self, pool: BlockPool, block_size: int, mover: KvMover) -> None:
        self._pool, self._block_size, self._mover = pool, block_size, mover
        self._results: list[OpResult] = []
        self._released: list[Job] = []
        self.copies = 0  # under way

    @property
    def generation(self) -> int:
        """Life of the sidecar, 0 if there is none."""
        return self._mover.generation

    def enqueue(self, job: Job, op: Op) -> None:
        """Start the operation, or queue it behind those of the same job."""
        job.ops.append(op)
        if not job.copying:
            self._start(job)

    def take_results(self) -> list[OpResult]:
        """Operations that ended since the last call."""
        results, self._results = self._results, []
        return results

    def take_released(self) -> list[Job]:
        """Jobs that were released since the last call."""
        released, self._released = self._released, []
        return released

    def forget_results(self) -> None:
        """Results of an earlier stream mean nothing to the next one."""
        self._results.clear()

    def free_device(self, job: Job) -> None:
        """Its device blocks are its own no more. No copy of them may be under way."""
        self._pool.give_back(job.blocks)
        job.blocks, job.computed, job.registered, job.found = [], 0, 0, None

    def fence(
        self,
        job: Job,
        start: Callable[[CopyDone], None],
        ended: CopyDone,
    ) -> None:
        """Start a copy that touches blocks of a job: its operations wait until it has ended."""
        job.copying = True
        self.copies += 1

        def done(status: OpStatus, copied: Copied) -> None:
            self.copies -= 1
            job.copying = False
            ended(status, copied)
            self._start(job)

        start(done)

    def _start(self, job: Job) -> None:
        """Run queued operations until one has to wait for a copy."""
        while job.ops and not job.copying:
            op = job.ops[0]
            match op.kind:
                case OpKind.OFFLOAD:
                    self._offload(job, op)
                case OpKind.COPY_OUT:
                    self._copy_out(job, op)
                case OpKind.EXPORT:
                    self._export(job, op)
                case OpKind.UPLOAD:
                    self._upload(job, op)
                case OpKind.DROP_DEVICE:
                    self.free_device(job)
                    self._end(job, op, OpStatus.OK, job.host_tokens)
                case OpKind.DROP_HOST:
                    self._release(job, op)
                case OpKind.RELEASE:
                    self.free_device(job)
                    self._release(job, op)

    def _release(self, job: Job, op: Op) -> None:
        self._copy(job, lambda done: self._mover.release(job.job_id, done), op)

    def _forget_lost(self, job: Job) -> None:
        """What an earlier sidecar held is gone, even if this one has blocks of the job."""
        if job.host_generation != self._mover.generation:
            job.host_tokens = 0

    def _offload(self, job: Job, op: Op) -> None:
        self._forget_lost(job)
        first = job.host_tokens // self._block_size  # a part-filled block is stored again
        refs = [
            BlockRef(i, job.blocks[i], min(self._block_size, job.computed - i * self._block_size))
            for i in range(first, -(-job.computed // self._block_size))
        ]
        if not refs or job.host_tokens >= job.computed:
            self.free_device(job)
            self._end(job, op, OpStatus.OK, job.host_tokens)
            return
        self._copy(job, lambda done: self._mover.store(job.job_id, refs, done), op)

    def _copy_out(self, job: Job, op: Op) -> None:
        """Full blocks are written once, so a row of the job may go on beside the copy."""
        refs, stored = self._next_full(job, op.blocks)
        if not refs:
            self._end(job, op, OpStatus.OK, job.host_tokens)
            return
        self._copy(job, lambda done: self._mover.store(job.job_id, refs, done), op, stored)

    def _export(self, job: Job, op: Op) -> None:
        refs, stored = self._next_full(job, op.blocks)
        to = op.to
        if to is None or not stored:
            self._end(job, op, OpStatus.NOT_SENT, job.host_tokens)
            return
        self._copy(job, lambda done: self._mover.export(job.job_id, refs, to, done), op, stored)

    def _next_full(self, job: Job, most: int) -> tuple[list[BlockRef], int]:
        """The next full blocks that the host lacks, and its tokens once it has them."""
        self._forget_lost(job)
        size = self._block_size
        first = job.host_tokens // size  # a part-filled block that is full by now is stored again
        end = min(job.computed // size, first + most)
        refs = [BlockRef(i, job.blocks[i], size) for i in range(first, end)]
        return refs, max(job.host_tokens, end * size)

    def _upload(self, job: Job, op: Op) -> None:
        self._forget_lost(job)
        if job.blocks or not job.host_tokens:
            status = OpStatus.OK if job.blocks else OpStatus.LOST
            self._end(job, op, status, job.computed)
            return
        try:
            job.blocks = self._pool.take(-(-job.host_tokens // self._block_size))
        except NoFreeBlock:
            self._end(job, op, OpStatus.NO_DEVICE_SPACE, 0)
            return
        blocks = list(job.blocks)
        self._copy(job, lambda done: self._mover.load(job.job_id, blocks, done), op)

    def _copy(self, job: Job, start: Callable[[CopyDone], None], op: Op, stored: int = 0) -> None:
        """stored: tokens on the host when a COPY_OUT or EXPORT is over."""

        def ended(status: OpStatus, copied: Copied) -> None:
            tokens = _moved(job, op, status, copied, stored)
            self._copied(job, op, status, copied, tokens)
            if job.ops and job.ops[0] is op:  # else the stream was reset meanwhile
                job.ops.popleft()
                result = OpResult(op.op_id, status, tokens, copied.bytes, copied.seconds)
                self._results.append(result)

        self.fence(job, start, ended)

    def _copied(self, job: Job, op: Op, status: OpStatus, copied: Copied, tokens: int) -> None:
        """What a copy that is over changes. tokens: see `_moved`."""
        match op.kind:
            case OpKind.OFFLOAD | OpKind.COPY_OUT if status is OpStatus.OK:
                job.host_tokens, job.host_generation = tokens, self._mover.generation
                if op.kind is OpKind.OFFLOAD:
                    self.free_device(job)
            case OpKind.EXPORT if copied.tokens:
                job.host_tokens, job.host_generation = tokens, self._mover.generation
            case OpKind.UPLOAD if status is OpStatus.OK:
                job.computed = tokens
            case OpKind.UPLOAD:
                self.free_device(job)
                if status is OpStatus.LOST:
                    job.host_tokens = 0
            case OpKind.DROP_HOST | OpKind.RELEASE:
                job.host_tokens = 0
        if op.kind is OpKind.RELEASE:
            self._released.append(job)

    def _end(self, job: Job, op: Op, status: OpStatus, tokens: int) -> None:
        """It ends without a copy."""
        job.ops.popleft()
        self._results.append(OpResult(op.op_id, status, tokens, 0, 0.0))


def _moved(job: Job, op: Op, status: OpStatus, copied: Copied, stored: int) -> int:
    """Tokens on the host, or after an UPLOAD on the device, now that a copy is over."""
    match op.kind:
        case OpKind.EXPORT:  # what was stored is, whether it was sent or not
            return stored if copied.tokens else job.host_tokens
        case OpKind.OFFLOAD if status is OpStatus.OK:
            return job.computed
        case OpKind.COPY_OUT if status is OpStatus.OK:
            return stored
        case OpKind.UPLOAD if status is OpStatus.OK:
            # The last known token is computed again: its logits are the next token's.
            return min(job.host_tokens, max(0, len(job.tokens) - 1))
    return 0
