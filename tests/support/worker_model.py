"""A worker group as the core sees it, without I/O: does what plans say, counts its own blocks.

Tokens are a hash of job and position, so that a lost, repeated or swapped one shows. What a
scheduler must never ask for raises AssertionError.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastserve.scheduler.core import (
    CostSample,
    FinishReason,
    Inventory,
    Job,
    KvOperation,
    KvOpKind,
    KvPlace,
    KvStatus,
    OpDone,
    Plan,
    Report,
    RowResult,
    SampledToken,
    WorkerInfo,
)


def token_of(job_id: str, index: int) -> int:
    """The token of a job at an output position."""
    return int.from_bytes(hashlib.blake2b(f"{job_id}/{index}".encode(), digest_size=2).digest())


def worker_info(worker_id: str = "w", **changes: int) -> WorkerInfo:
    values = {
        "block_size": 4,
        "device_blocks": 16,
        "host_blocks": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        **changes,
    }
    return WorkerInfo(
        worker_id=worker_id,
        prefill_sample=CostSample(1, 16, 16, 0.030),
        decode_sample=CostSample(1, 1, 16, 0.010),
        **values,
    )


@dataclass
class Held:
    """What the worker knows of a job."""

    job_id: str
    known: int  # tokens it was told or sampled
    prompt_len: int
    max_len: int
    length: int  # tokens, prompt included, after which it ends by itself
    computed: int = 0
    host: int = 0
    device_blocks: int = 0
    host_blocks: int = 0
    copied_out: int = 0  # tokens on the host when the copy under way is over
    finished: bool = False
    ops: deque[KvOperation] = field(default_factory=deque)
    copying: bool = False
    imported: int = 0  # tokens that it is said to have from another group, when it is met


class WorkerModel:
    """Runs plans one iteration at a time; copies last until `finish_copies`."""

    def __init__(
        self,
        info: WorkerInfo,
        lengths: dict[str, int],
        find: Callable[[str], Job | None],
        cached: dict[str, int] | None = None,
    ) -> None:
        """lengths: job id -> output tokens after which it stops by itself. find: a live job.
        cached: job id -> tokens that the prefix cache has of it; it may begin with full blocks of
        them. Its blocks are counted as if nobody shared them: that is the worst case.
        """
        self.cached = {} if cached is None else cached
        self.info = info
        self.lengths = lengths
        self.find = find
        self.named: set[str] = set()  # on this stream
        self.held: dict[str, Held] = {}
        self.inbox: deque[tuple[Plan, list[Held], Sequence[KvOperation]]] = deque()
        self.work: list[tuple[Held, int]] = []  # of the iteration under way: rows, and their tokens
        self.plan: Plan | None = None
        self.lease = 0
        self.iteration = 0
        self.early: Counter[KvOpKind] = Counter()  # operations that began beside an iteration
        self.done: list[OpDone] = []
        self.found: list[tuple[str, int]] = []  # in the prefix cache, by rows of the iteration
        self.clock = 0.0  # seconds that iterations took
        self.host_loses = False  # the sidecar died: uploads report LOST
        self.host_refuses = False  # offloads report NO_HOST_SPACE, whatever is free
        self.device_refuses = False  # uploads report NO_DEVICE_SPACE, likewise
        self.peers: dict[str, WorkerModel] = {}  # those that it can send KV to
        self.sends_in_vain = False  # exports report NOT_SENT, and nothing arrives
        self.sends_unheard = False  # exports report NOT_SENT, though all arrives
        self.imports: dict[str, int] = {}  # tokens on the host that other groups sent, by job
        self.stalls: set[str] = set()  # jobs that find no block in the next iteration

    # --- memory ------------------------------------------------------------------------------

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.info.block_size)

    @property
    def free_device(self) -> int:
        return self.info.device_blocks - sum(job.device_blocks for job in self.held.values())

    @property
    def free_host(self) -> int:
        held = sum(job.host_blocks for job in self.held.values())
        return self.info.host_blocks - held - sum(map(self._blocks, self.imports.values()))

    @property
    def place(self) -> KvPlace:
        return KvPlace(self.info.worker_id, "layout", ("host:1",))

    # --- plans -------------------------------------------------------------------------------

    def receive(self, plan: Plan) -> None:
        """A plan arrives; jobs that this stream has not named yet come whole, as they are now."""
        new: list[Held] = []
        named = [*(row.job.job_id for row in plan.rows), *(op.job_id for op in plan.ops)]
        for job_id in [*plan.introduce, *named]:
            job = self.find(job_id)
            if job_id in self.named and job_id not in plan.introduce:
                continue
            if any(held.job_id == job_id for held in new):
                continue
            self.named.add(job_id)
            if job is None:
                new.append(Held(job_id, 0, 0, 0, 0))  # to be released
                continue
            length = job.prompt_len + min(self.lengths[job_id], job.spec.max_tokens)
            held = Held(job_id, job.known_len, job.prompt_len, job.max_len, length)
            held.imported = plan.introduce.get(job_id, 0)
            new.append(held)
        begun = self._begin_ops(plan, new) if self.work else 0
        self.inbox.append((plan, new, plan.ops[begun:]))

    def _begin_ops(self, plan: Plan, new: list[Held]) -> int:
        """Beside the iteration under way: operations up to the first whose job has a row or is new,
        unless some of earlier plans wait. How many."""
        if any(ops for _, _, ops in self.inbox):
            return 0
        busy = {job.job_id for job, _ in self.work}
        busy |= {row.job.job_id for other, _, _ in self.inbox for row in other.rows}
        busy |= {held.job_id for _, others, _ in self.inbox for held in others}
        busy |= {held.job_id for held in new}
        for begun, op in enumerate(plan.ops):
            if op.job_id in busy or op.job_id not in self.held:
                return begun
            self.early[op.kind] += 1
            self.held[op.job_id].ops.append(op)
            self._start(self.held[op.job_id])
        return len(plan.ops)

    def apply_all(self) -> None:
        """What happens at an iteration boundary."""
        while self.inbox:
            self._apply(*self.inbox.popleft())

    def _apply(self, plan: Plan, new: list[Held], ops: Sequence[KvOperation]) -> None:
        assert self.plan is None or plan.plan_id > self.plan.plan_id
        self.plan, self.lease = plan, plan.lease
        named = [row.job.job_id for row in plan.rows]
        assert len(named) == len(set(named)), "a job twice in an iteration"
        assert len(named) <= self.info.max_num_seqs, "too many rows"
        for job in new:
            self._meet(job)
        for op in ops:
            target = self.held.get(op.job_id)
            assert target is not None, "an operation on an unknown job"
            target.ops.append(op)
            self._start(target)
        for row in plan.rows:
            held = self.held[row.job.job_id]
            assert row.tokens > 0
            beside = (KvOpKind.COPY_OUT, KvOpKind.EXPORT)
            moving = [op for op in held.ops if op.kind not in beside]
            assert not moving, "a row for a job whose KV is moving"
            assert held.computed or not held.host or held.finished, "a row without an upload"

    def _meet(self, new: Held) -> None:
        held = self.held.setdefault(new.job_id, new)
        held.known, held.finished = new.known, False
        if new.imported:
            held.host = self.imports.pop(new.job_id, 0)
            held.host_blocks = self._blocks(held.host)
        if held.device_blocks:
            held.computed = min(held.computed, held.known - 1)
            held.device_blocks = self._blocks(held.computed)

    def _start(self, job: Held) -> None:
        while job.ops and not job.copying:
            op = job.ops[0]
            if op.kind is KvOpKind.OFFLOAD and job.host < job.computed:
                more = self._blocks(job.computed) - job.host_blocks
                if more > self.free_host or self.host_refuses:
                    self._end(job, KvStatus.NO_HOST_SPACE)
                    continue
                job.host_blocks += max(0, more)
                job.copying = True
            elif op.kind is KvOpKind.COPY_OUT:
                assert op.blocks > 0, "a copy of nothing"
                full = min(
                    job.computed // self.info.block_size,
                    job.host // self.info.block_size + op.blocks,
                )
                job.copied_out = max(job.host, full * self.info.block_size)
                more = max(0, full - job.host_blocks)
                if more > self.free_host or self.host_refuses:
                    self._end(job, KvStatus.NO_HOST_SPACE)
                    continue
                job.host_blocks += more
                job.copying = True
            elif op.kind is KvOpKind.EXPORT:
                full = min(
                    job.computed // self.info.block_size,
                    job.host // self.info.block_size + op.blocks,
                )
                job.copied_out = max(job.host, full * self.info.block_size)
                more = max(0, self._blocks(job.copied_out) - job.host_blocks)
                if more > self.free_host or self.host_refuses:
                    self._end(job, KvStatus.NO_HOST_SPACE, job.host)
                    continue
                job.host_blocks += more
                job.copying = True
            elif op.kind is KvOpKind.UPLOAD and self.device_refuses:
                self._end(job, KvStatus.NO_DEVICE_SPACE)
            elif op.kind is KvOpKind.UPLOAD and not self.host_loses and job.host:
                blocks = self._blocks(job.host)
                assert blocks <= self.free_device, "an upload without room"
                assert not job.device_blocks
                job.device_blocks = blocks
                job.copying = True
            elif op.kind in (KvOpKind.DROP_HOST, KvOpKind.RELEASE):
                if op.kind is KvOpKind.RELEASE:
                    job.computed = job.device_blocks = 0
                job.copying = True
            else:
                self._finish(job)

    def _finish(self, job: Held) -> None:
        """End the operation at the head."""
        op = job.ops[0]
        if op.kind is KvOpKind.OFFLOAD:
            job.host = max(job.host, job.computed)
            job.computed = job.device_blocks = 0
            self._end(job, KvStatus.OK, job.host)
        elif op.kind is KvOpKind.COPY_OUT:
            assert job.computed >= job.copied_out or job.host >= job.copied_out, "freed too early"
            job.host = job.copied_out
            self._end(job, KvStatus.OK, job.host)
        elif op.kind is KvOpKind.EXPORT:
            job.host = job.copied_out
            self._end(job, self._deliver(job, op), job.host)
        elif op.kind is KvOpKind.UPLOAD:
            if self.host_loses or not job.host:
                job.host = job.host_blocks = 0
                self._end(job, KvStatus.LOST)
            else:
                job.computed = min(job.host, job.known - 1)
                job.device_blocks = self._blocks(job.computed)
                self._end(job, KvStatus.OK, job.computed)
        elif op.kind is KvOpKind.DROP_DEVICE:
            job.computed = job.device_blocks = 0
            self._end(job, KvStatus.OK)
        else:
            job.host = job.host_blocks = 0
            self._end(job, KvStatus.OK)
            if op.kind is KvOpKind.RELEASE:
                self.imports.pop(job.job_id, None)
                del self.held[job.job_id]
                self.named.discard(job.job_id)

    def _deliver(self, job: Held, op: KvOperation) -> KvStatus:
        """Send what is on the host to the sidecar of another group."""
        assert op.to is not None
        peer = self.peers.get(op.to.worker_id)
        if peer is None or self.sends_in_vain or not job.host or job.job_id in peer.imports:
            return KvStatus.NOT_SENT
        if peer.free_host < self._blocks(job.host):
            return KvStatus.NOT_SENT
        peer.imports[job.job_id] = job.host
        return KvStatus.NOT_SENT if self.sends_unheard else KvStatus.OK

    def _end(self, job: Held, status: KvStatus, tokens: int = 0) -> None:
        self.done.append(OpDone(job.ops.popleft().op_id, status, tokens, tokens * 10))

    def finish_copies(self) -> None:
        """Every copy that is under way ends, and those queued behind it begin."""
        for job in [job for job in self.held.values() if job.copying]:
            job.copying = False
            self._finish(job)
            self._start(job)

    # --- iterations --------------------------------------------------------------------------

    def step(self, seconds: float = 0.010, *, boundary: bool = True) -> Report | None:
        """One boundary and one iteration, if there is anything to do or to tell.

        Without the boundary it is the one that began before the newest plans came: see `begin`.
        """
        if boundary:
            self.apply_all()
        if not self.work:
            self.begin()
        work, self.work = self.work, []
        stalls, self.stalls = self.stalls, set()
        found, self.found = self.found, []
        if not work:
            return self.ended_report()
        self.clock += seconds
        rows: list[RowResult] = []
        sampled: list[SampledToken] = []
        for job, count in work:
            job.computed += count
            rows.append(RowResult(job.job_id, count, job.computed))
            if count and job.computed == job.known:
                sampled.append(self._sample(job))
        return self._report(
            iteration=self.iteration,
            rows=rows,
            sampled=sampled,
            cached=found,
            stalled=sorted(stalls & {row.job_id for row in rows}),
            seconds=seconds,
            context_tokens=sum(row.computed for row in rows),
        )

    def begin(self) -> None:
        """An iteration begins, if there is anything to run: blocks are taken for its rows. It ends
        with `step`; operations of plans that come before that may begin beside it."""
        if self.plan is None or not self.lease:
            return
        self.work = []
        for job, most in self._live_rows():
            if not job.device_blocks and job.job_id not in self.stalls:
                known = min(self.cached.get(job.job_id, 0), job.known - 1)
                job.device_blocks = known // self.info.block_size
                job.computed = job.device_blocks * self.info.block_size
                if job.computed:
                    self.found.append((job.job_id, job.computed))
            count = 0 if job.job_id in self.stalls else min(most, job.known - job.computed)
            blocks = self._blocks(job.computed + count)
            assert blocks - job.device_blocks <= self.free_device, "no block for a row"
            job.device_blocks = max(blocks, job.device_blocks)
            self.work.append((job, count))
        total = sum(count for _, count in self.work)
        assert total <= self.info.max_num_batched_tokens, "too many tokens in an iteration"
        if self.work:
            self.lease -= 1
            self.iteration += 1

    def ended_report(self) -> Report | None:
        """What ended since the last report, beside an iteration or without one."""
        return self._report(iteration=0) if self.done else None

    def _report(self, **of_iteration: Any) -> Report:
        done, self.done = self.done, []
        return Report(
            plan_id=self.plan.plan_id if self.plan else 0,
            ops=done,
            free_device_blocks=self.free_device,
            free_host_blocks=self.free_host,
            **of_iteration,
        )

    def _live_rows(self) -> list[tuple[Held, int]]:
        assert self.plan is not None
        rows = [(self.held.get(row.job.job_id), row.tokens) for row in self.plan.rows]
        return [(job, most) for job, most in rows if job is not None and not job.finished]

    def _sample(self, job: Held) -> SampledToken:
        index = job.known - job.prompt_len
        job.known += 1
        job.finished = job.known >= job.length
        reason = None
        if job.finished:
            cut = job.known >= job.max_len
            reason = FinishReason.LENGTH if cut else FinishReason.STOP
        return SampledToken(job.job_id, index, token_of(job.job_id, index), reason)

    # --- streams -----------------------------------------------------------------------------

    def reconnect(self, *, died: bool, host_lost: bool = False) -> Inventory:
        """The stream breaks, or the process dies, which loses the device; a new one opens."""
        vain, self.sends_in_vain = self.sends_in_vain, True  # exports are stopped
        while any(job.copying for job in self.held.values()):
            self.finish_copies()
        self.sends_in_vain = vain
        if host_lost:
            self.imports.clear()
        for job in list(self.held.values()):
            job.ops.clear()
            if died:
                job.computed = job.device_blocks = 0
            if host_lost:
                job.host = job.host_blocks = 0
            if not job.computed and not job.host:
                del self.held[job.job_id]
                self.named.discard(job.job_id)
        self.named.clear()
        self.inbox.clear()
        self.done.clear()
        self.work, self.found = [], []
        self.plan, self.lease, self.iteration = None, 0, 0
        for job_id, tokens in self.imports.items():
            held = self.held.setdefault(job_id, Held(job_id, 0, 0, 0, 0))
            held.host = max(held.host, tokens)
            held.host_blocks = self._blocks(held.host)
        self.imports.clear()
        return Inventory(
            {job.job_id: job.computed for job in self.held.values() if job.computed},
            {job.job_id: job.host for job in self.held.values() if job.host},
            self.place,
        )
