"""The engine: one iteration after another, as the plan in force says. Synchronous, for one caller
at a time.

Copies between device and host are started through `KvMover`; until it says that they have ended
their blocks are left alone. While the model computes, others may act on jobs that have no row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import structlog
import torch

from fastserve.worker.block_pool import BlockPool, NoFreeBlock
from fastserve.worker.host_cache import CacheMover, HostCache
from fastserve.worker.job import Job, Op, OpResult
from fastserve.worker.kv_ops import KvMover, KvOps
from fastserve.worker.model.batch import Batch
from fastserve.worker.model.kv_cache import KvCache
from fastserve.worker.model.sampling import Sampled, SampleRow, SamplingParams, sample
from fastserve.worker.prefix_cache import BlockKeys

log = structlog.get_logger(__name__)
_ALONE = nullcontext()


class ForwardModel(Protocol):
    """The part of the model that the engine needs."""

    def forward(self, batch: Batch, kv: KvCache) -> torch.Tensor: ...


class Mover(KvMover, CacheMover, Protocol):
    """All copies between device and host."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job as the scheduler sends it, whole."""

    handle: int
    job_id: str
    token_ids: list[int]
    prompt_len: int
    params: SamplingParams
    traceparent: str
    salt: bytes = b""  # jobs with the same one share KV of equal beginnings; b"": with nobody
    imported: int = 0  # tokens that another worker group sent to our sidecar


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do until the next plan (worker.proto, Plan)."""

    plan_id: int
    lease: int
    new_jobs: Sequence[NewJob]
    rows: Sequence[tuple[int, int]]  # handle, most tokens per iteration
    ops: Sequence[Op]


@dataclass(slots=True)
class Iteration:
    """What one iteration did, and whatever else ended since the last report."""

    plan_id: int
    iteration: int = 0
    rows: list[tuple[int, int, int]] = field(default_factory=list)  # handle, new, computed
    sampled: list[tuple[int, int, Sampled, str]] = field(default_factory=list)
    #   handle, output index, token, finish: "", "stop" or "length"
    lookups: list[tuple[int, int, int, int]] = field(default_factory=list)
    #   jobs that began with nothing on the device: handle, known tokens, those found in the cache
    #   on the device, and on the host
    stalled: list[int] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)
    ops: list[OpResult] = field(default_factory=list)
    started: float = 0.0
    seconds: float = 0.0
    control_seconds: float | None = None  # since the one before it, if that left rows
    context_tokens: int = 0
    traceparents: list[str] = field(default_factory=list)

    @property
    def begins_alone(self) -> bool:
        """Whether it had one row and gave that job its first token."""
        return len(self.rows) == 1 and any(index == 0 for _, index, _, _ in self.sampled)


class Engine:
    """Jobs, their KV blocks, and the plan in force."""

    def __init__(
        self,
        model: ForwardModel,
        kv: KvCache,
        mover: Mover,
        *,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        vocab_size: int,
    ) -> None:
        self._model, self._kv = model, kv
        self._eos = eos_token_ids
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self.pool = BlockPool(kv.num_blocks)
        self._keys = BlockKeys(kv.block_size)
        self.kv_ops = KvOps(self.pool, kv.block_size, mover)
        self._host = HostCache(self.pool, kv.block_size, self.kv_ops, mover)
        self._held: dict[str, Job] = {}
        self._by_handle: dict[int, Job] = {}
        self._rows: list[tuple[Job, int]] = []
        self._lease = 0
        self._plan_id = 0
        self._iterations = 0
        self._failed: list[tuple[int, str]] = []

    # --- streams -----------------------------------------------------------------------------

    def detach(self) -> None:
        """The scheduler is gone: stop after this iteration and keep all state."""
        self._rows, self._lease = [], 0

    def reset(self, plan_id: int, host_tokens: dict[str, int]) -> dict[str, tuple[int, int]]:
        """A new scheduler stream: forget handles, and take stock.

        `host_tokens`: job id -> committed tokens, as the sidecar says. Returns job id ->
        (tokens in device KV, tokens on the host) of every job held. No copy may be under way.
        """
        self.detach()
        self._by_handle.clear()
        self._plan_id, self._iterations = plan_id, 0
        self._failed.clear()
        self.kv_ops.forget_results()
        for job_id, job in list(self._held.items()):
            job.ops.clear()
            job.host_tokens = host_tokens.get(job_id, 0)
            job.host_generation = self.kv_ops.generation
            if job.finished or (not job.blocks and not job.host_tokens):
                # A finished job may be one whose last token the scheduler never heard of; it is
                # sent whole again then, and its KV is recomputed or uploaded.
                self.kv_ops.free_device(job)
                if not job.host_tokens:
                    del self._held[job_id]
        for job_id, tokens in host_tokens.items():
            if job_id not in self._held:
                params = SamplingParams(max_tokens=1)
                job = Job(job_id, 0, [], 0, params, host_tokens=tokens)
                job.host_generation = self.kv_ops.generation
                self._held[job_id] = job
        return {job.job_id: (job.computed, job.host_tokens) for job in self._held.values()}

    # --- plans -------------------------------------------------------------------------------

    @property
    def runnable(self) -> bool:
        """Whether `step` would run an iteration."""
        return self._lease > 0 and any(not job.fetching for job, _ in self._rows)

    @property
    def has_rows(self) -> bool:
        """Whether the plan in force has rows that have not finished."""
        return bool(self._rows)

    def begin_ops(self, plan: Plan, before: Sequence[Plan]) -> int:
        """Begin the operations of a plan that is not in force yet, as far as they can be begun
        beside an iteration; returns how many. `before`: the plans that come into force before it.

        They begin in their order, up to the first whose job has a row, or is new.
        """
        if any(other.ops for other in before):
            return 0
        busy = {job.handle for job, _ in self._rows}
        for other in before:
            busy.update(handle for handle, _ in other.rows)
        busy.update(new.handle for other in (*before, plan) for new in other.new_jobs)
        for number, op in enumerate(plan.ops):
            job = self._by_handle.get(op.handle)
            if job is None or op.handle in busy:
                return number
            self.kv_ops.enqueue(job, op)
        return len(plan.ops)

    def apply(self, plan: Plan) -> None:
        """Put a plan in force. What is wrong with one job fails that job alone."""
        self._plan_id, self._lease = plan.plan_id, plan.lease
        for new in plan.new_jobs:
            self._admit(new)
        for op in plan.ops:
            job = self._by_handle.get(op.handle)
            if job is None:
                self._failed.append((op.handle, "a KV operation names an unknown job"))
                continue
            self.kv_ops.enqueue(job, op)
        self._rows = []
        for handle, tokens in plan.rows:
            job = self._by_handle.get(handle)
            why = _why_not(job, tokens)
            if why:
                self._failed.append((handle, why))
            elif job is not None and not job.finished:
                self._rows.append((job, tokens))
                if job.salt and not job.blocks and not job.copying:
                    self._host.fetch(job, self._beginning(job))
        self.forget_released()

    def forget_released(self) -> None:
        """Drop the jobs whose release has ended."""
        for job in self.kv_ops.take_released():
            self._held.pop(job.job_id, None)
            self._by_handle.pop(job.handle, None)

    def _admit(self, new: NewJob) -> None:
        job = self._held.get(new.job_id)
        if job is None:
            job = Job(new.job_id, new.handle, new.token_ids, new.prompt_len, new.params)
            self._held[new.job_id] = job
        else:
            common = _common_prefix(job.tokens, new.token_ids)
            if job.blocks:
                # Recomputing the last token yields its logits: keep KV of what comes before it.
                job.computed = max(0, min(job.computed, common, len(new.token_ids) - 1))
                self._trim(job)
            if job.host_tokens > common:
                # The host may have KV of output that was lost and sampled again, rounded otherwise.
                job.certain = min(job.certain, max(common, new.prompt_len))
            if self._by_handle.get(job.handle) is job:  # it is named again on the same stream
                del self._by_handle[job.handle]
            job.tokens, job.prompt_len, job.params = new.token_ids, new.prompt_len, new.params
            job.handle, job.finished = new.handle, False
            job.keys, job.registered = [], 0
        job.traceparent, job.salt = new.traceparent, new.salt
        if new.imported:
            job.host_tokens, job.host_generation = new.imported, self.kv_ops.generation
        self._by_handle[new.handle] = job
        why = self._why_unfit(new)
        if why:
            job.finished = True
            self._failed.append((new.handle, why))

    def _why_unfit(self, new: NewJob) -> str:
        """Why the model cannot run a job, which would break its whole batch; "" if it can."""
        params = new.params
        named = [*new.token_ids, *params.stop_token_ids, *(token for token, _ in params.logit_bias)]
        highest = max(named, default=0)
        if highest >= self._vocab_size:
            return f"token {highest} is not in the vocabulary of {self._vocab_size}"
        if (params.logprobs or 0) > self._vocab_size:
            return "more log-probabilities than tokens are asked for"
        if len(new.token_ids) > self._max_model_len:
            return f"the job is longer than the model's length of {self._max_model_len}"
        return ""

    def _trim(self, job: Job) -> None:
        """Keep the blocks of what is computed; one that others read is not written again."""
        full, part = divmod(job.computed, self._kv.block_size)
        if part and self.pool.shared(job.blocks[full]):
            job.computed, part = job.computed - part, 0
        keep = full + bool(part)
        self.pool.give_back(job.blocks[keep:])
        del job.blocks[keep:]

    # --- iterations --------------------------------------------------------------------------

    def step(self, computing: AbstractContextManager[None] = _ALONE) -> Iteration:
        """Run one iteration of the plan in force. Call only if `runnable`.

        computing: entered while the model computes.
        """
        started, clock = time.time(), time.perf_counter()
        self._lease -= 1
        self._iterations += 1
        result = Iteration(self._plan_id, self._iterations, started=started)
        work = self._claim_blocks(result)
        if work:
            self._forward(work, result, computing)
        self._rows = [row for row in self._rows if not row[0].finished]
        self._collect(result)
        result.seconds = time.perf_counter() - clock
        return result

    def ended_report(self) -> Iteration | None:
        """What ended since the last iteration, if anything did."""
        result = Iteration(self._plan_id)
        self._collect(result)
        return result if result.ops or result.failed else None

    def _collect(self, result: Iteration) -> None:
        self.forget_released()
        self._host.save(idle=not self._rows)
        result.ops = self.kv_ops.take_results()
        result.failed = result.failed + self._failed
        self._failed = []

    def _claim_blocks(self, result: Iteration) -> list[tuple[Job, int]]:
        """Rows that can run with the count of tokens each processes; blocks are taken for them."""
        work = []
        for job, most in self._rows:
            if job.fetching:
                continue
            begins = not job.blocks
            if begins:
                self._share(job)
            count = min(most, len(job.tokens) - job.computed)
            needed = -(-(job.computed + count) // self._kv.block_size) - len(job.blocks)
            try:
                fresh = self.pool.take(max(0, needed))
            except NoFreeBlock as error:
                log.error("a row has no block", job_id=job.job_id, reason=str(error))
                result.stalled.append(job.handle)
                if begins:
                    self.kv_ops.free_device(job)
                continue
            if job.found is not None:
                result.lookups.append((job.handle, len(job.tokens), *job.found))
                job.found = None
            job.blocks += fresh
            work.append((job, count))
        return work

    def _share(self, job: Job) -> None:
        """Begin with the full blocks that are there already."""
        if job.salt:
            job.blocks = self.pool.share(self._beginning(job))
            job.registered = len(job.blocks)
            job.computed = job.registered * self._kv.block_size
            job.found = (job.computed, 0)

    def _beginning(self, job: Job) -> Iterator[bytes]:
        """Keys of its full blocks, but for the last known token: its logits are the next one's."""
        return self._keys.of(job, 0, (len(job.tokens) - 1) // self._kv.block_size)

    def _offer(self, job: Job) -> None:
        """Let others have the blocks that have become full."""
        full = int(min(job.computed, job.certain)) // self._kv.block_size
        if job.salt and full > job.registered:
            first, job.registered = job.registered, full
            keys = self._keys.of(job, first, full)
            for block, key in zip(job.blocks[first:full], keys, strict=True):
                self.pool.register(block, key)

    def _forward(
        self,
        work: list[tuple[Job, int]],
        result: Iteration,
        computing: AbstractContextManager[None],
    ) -> None:
        batch = Batch(
            token_ids=[
                token for job, n in work for token in job.tokens[job.computed : job.computed + n]
            ],
            query_lens=[n for _, n in work],
            context_lens=[job.computed + n for job, n in work],
            block_tables=[job.blocks for job, _ in work],
            logit_rows=[
                row for row, (job, n) in enumerate(work) if job.computed + n == len(job.tokens)
            ],
            tops=[job.params.top for job, n in work if job.computed + n == len(job.tokens)],
        )
        sampling = [work[row][0] for row in batch.logit_rows]
        rows = [_sample_row(job) for job in sampling]
        try:
            with computing:  # a GPU does until its choice is here
                logits = self._model.forward(batch, self._kv)
                if not sampling:  # with a choice the device is through: copies count on that
                    self._kv.settle()
                chosen = sample(logits, rows, self._eos)
        except (RuntimeError, ValueError, IndexError) as error:
            log.exception("the iteration failed")
            for job, _ in work:
                self._fail(job, f"the model failed: {error}", result)
            return
        for job, count in work:
            job.computed += count
            result.rows.append((job.handle, count, job.computed))
            result.context_tokens += job.computed
            self._offer(job)
            if job.traceparent:
                result.traceparents.append(job.traceparent)
        for job, token in zip(sampling, chosen, strict=True):
            if token is None:
                self.pool.forget(job.blocks)
                self._host.forget(job.keys)
                self._fail(job, "the model's logits are not finite", result)
            else:
                self._append(job, token, result)

    def _append(self, job: Job, sampled: Sampled, result: Iteration) -> None:
        index = len(job.tokens) - job.prompt_len
        job.tokens.append(sampled.token)
        params, finish = job.params, ""
        ends_text = sampled.token in self._eos and not params.ignore_eos
        if ends_text or sampled.token in params.stop_token_ids:
            finish = "stop"
        elif index + 1 >= params.max_tokens or len(job.tokens) >= self._max_model_len:
            finish = "length"
        job.finished = bool(finish)
        result.sampled.append((job.handle, index, sampled, finish))

    def _fail(self, job: Job, why: str, result: Iteration) -> None:
        job.finished = True
        result.failed.append((job.handle, why))


def _sample_row(job: Job) -> SampleRow:
    if job.params.plain_greedy:  # copies of the tokens would cost more than the choice
        return SampleRow(job.params)
    return SampleRow(job.params, job.tokens[: job.prompt_len], job.output_ids)


def _why_not(job: Job | None, tokens: int) -> str:
    """Why a row cannot run; "" if it can."""
    if job is None:
        return "a row names an unknown job"
    if tokens < 1:
        return "a row with no tokens"
    if job.moving:
        return "a row for a job whose KV is moving"
    if not job.tokens:
        return "a row for a job without tokens"
    return ""


def _common_prefix(a: list[int], b: list[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
