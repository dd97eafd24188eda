"""A worker that computes nothing and knows how long everything would take."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.bench.sim.types import SimOptions
from fastserve.scheduler.core import (
    FinishReason,
    KvOpKind,
    KvStatus,
    OpDone,
    Plan,
    Report,
    WorkerInfo,
)


@dataclass(slots=True)
class _Held:
    """What the worker knows of a job, in tokens."""

    job_id: str
    known: int
    prompt: int
    computed: int = 0
    host: int = 0
    busy_until: float = 0.0  # its last copy ends


class SimWorker:
    """Runs plans in simulated time. One channel to the host and one from it, beside computing."""

    def __init__(self, options: SimOptions, info: WorkerInfo, speed: float = 1.0) -> None:
        """speed: how many times as fast as the hardware says."""
        self._hardware, self._speed = options.hardware, speed
        self._seconds_per_token = options.hardware.kv_bytes_per_token / (options.pcie_gbps * 1e9)
        self._fixed_s = options.copy_ms / 1e3
        self._info = info
        self._held: dict[str, _Held] = {}
        self._rows: list[tuple[_Held, int]] = []
        self._lease = 0
        self._plan_id = 0
        self._iteration = 0
        self._out_free = self._in_free = 0.0  # when the channels are free again
        self._copies: list[tuple[float, OpDone, _Held, KvOpKind]] = []
        self._released: dict[int, str] = {}

    def forget(self, job_id: str) -> None:
        """It ended: nothing more is computed for it."""
        self._rows = [row for row in self._rows if row[0].job_id != job_id]

    def receive(self, plan: Plan, now: float) -> None:
        self._plan_id, self._lease = plan.plan_id, plan.lease
        for op in plan.ops:
            self._begin(op.kind, op.op_id, op.job_id, op.blocks, now)
        held = self._held
        for job, _ in plan.rows:
            if job.spec.job_id not in held:  # it comes whole, with what it had elsewhere
                held[job.spec.job_id] = _Held(job.spec.job_id, job.known_len, job.prompt_len)
        self._rows = [(held[job.spec.job_id], tokens) for job, tokens in plan.rows]

    def _begin(self, kind: KvOpKind, op_id: int, job_id: str, blocks: int, now: float) -> None:
        held = self._held[job_id]
        end, tokens, moved = now, 0, 0
        if kind is KvOpKind.OFFLOAD:
            tokens, moved = held.computed, max(0, held.computed - held.host)
            end = self._out_free = max(now, self._out_free) + self._copy_s(moved)
        elif kind is KvOpKind.COPY_OUT:
            in_block = self._info.block_size
            first = held.host // in_block
            last = min(held.computed // in_block, first + blocks)
            tokens, moved = max(held.host, last * in_block), max(0, last - first) * in_block
            end = self._out_free = max(now, self._out_free) + self._copy_s(moved)
        elif kind is KvOpKind.UPLOAD:
            tokens = moved = min(held.host, held.known - 1)
            end = self._in_free = max(now, self._in_free) + self._copy_s(moved)
        elif kind is KvOpKind.DROP_DEVICE:
            held.computed = 0
        elif kind is KvOpKind.RELEASE:
            end = max(now, held.busy_until)
            self._released[op_id] = job_id
        held.busy_until = end
        size = moved * self._hardware.kv_bytes_per_token
        done = OpDone(op_id, KvStatus.OK, tokens, size, end - now)
        self._copies.append((end, done, held, kind))

    def _copy_s(self, tokens: int) -> float:
        return self._fixed_s + tokens * self._seconds_per_token if tokens else 0.0

    @property
    def runnable(self) -> bool:
        """There are rows to run."""
        return bool(self._rows and self._lease)

    @property
    def copied_at(self) -> float:
        """When the next copy ends; infinity: none is under way."""
        return min((copy[0] for copy in self._copies), default=float("inf"))

    def copied(self, now: float) -> Report | None:
        """The copies that have ended by now, while nothing runs."""
        done = self._finished(now)
        return Report(plan_id=self._plan_id, iteration=0, ops=done) if done else None

    def iterate(self, now: float) -> tuple[float, Report]:
        """One iteration: when it ends, and its report then. Only if `runnable`."""
        self._lease -= 1
        self._iteration += 1
        chunks: list[tuple[int, int]] = []
        rows: list[tuple[str, int, int]] = []
        sampled: list[tuple[str, int, int, FinishReason | None]] = []
        decode_context = context = 0
        for held, most in self._rows:
            known, start = held.known, held.computed
            if known - start == 1:
                end = known
                decode_context += known
                rows.append((held.job_id, 1, known))
            else:
                end = min(start + most, known)
                chunks.append((start, end))
                context += end
                rows.append((held.job_id, end - start, end))
            held.computed = end
            if end == known:
                sampled.append((held.job_id, known - held.prompt, 0, None))
                held.known = known + 1
        decodes = len(rows) - len(chunks)
        seconds = self._hardware.iteration_s(chunks, decodes, decode_context) / self._speed
        now += seconds
        report = Report(
            plan_id=self._plan_id,
            iteration=self._iteration,
            rows=rows,
            sampled=sampled,
            ops=self._finished(now),
            seconds=seconds,
            context_tokens=context + decode_context,
        )
        return now, report

    def _finished(self, now: float) -> list[OpDone]:
        """Copies that ended by now, in the order in which they began."""
        if not self._copies:
            return []
        over = [copy for copy in self._copies if copy[0] <= now]
        self._copies = [copy for copy in self._copies if copy[0] > now]
        for _, done, held, kind in over:
            if kind is KvOpKind.OFFLOAD:
                held.host, held.computed = max(held.host, held.computed), 0
            elif kind is KvOpKind.COPY_OUT:
                held.host = done.tokens
            elif kind is KvOpKind.UPLOAD:
                held.computed = done.tokens
            elif kind is KvOpKind.DROP_HOST:
                held.host = 0
            elif kind is KvOpKind.RELEASE:
                del self._held[self._released.pop(done.op_id)]
        return [done for _, done, _, _ in over]
