"""What a report of a worker changes: tokens, service, KV operations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from fastserve.scheduler.core.cost_model import CostModel, Work, chunk, work_of
from fastserve.scheduler.core.errors import ProtocolError
from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.migrations import Migrations
from fastserve.scheduler.core.types import (
    EventKind,
    Finished,
    FinishReason,
    KvOpKind,
    KvState,
    KvStatus,
    OpDone,
    Progress,
    Report,
)

# A host that refused blocks which were counted as free is left alone for so long.
_HOST_PAUSE_S = 1.0

Tell = Callable[[Job, EventKind, float], None]
End = Callable[[Job, FinishReason, float], None]


class ReportReader:
    """Applies reports of any group. `end` ends a job."""

    def __init__(
        self, end: End, tell: Tell, counters: Counter[str], migrations: Migrations
    ) -> None:
        self._end, self._tell, self._counters = end, tell, counters
        self._migrations = migrations

    def apply(self, group: Group, report: Report, now: float) -> Progress:
        """Raises `ProtocolError` for what the worker cannot have seen; nothing has changed then."""
        if report.plan_id > group.plan_id:
            raise ProtocolError(f"report of plan {report.plan_id}, sent were {group.plan_id}")
        if report.iteration and report.iteration != group.iteration + 1:
            raise ProtocolError(f"iteration {report.iteration} after {group.iteration}")
        ended: set[int] = set()
        for done in report.ops:
            if done.op_id not in group.ops or done.op_id in ended:
                raise ProtocolError(f"KV operation {done.op_id} was never sent, or ended twice")
            ended.add(done.op_id)
        _check_sense(group, report)
        group.iteration += bool(report.iteration)
        group.reached(report.plan_id, bool(report.iteration), len(report.rows), report.seconds)
        progress = Progress([], [])
        for job_id, tokens in report.cached:
            self._began(group, job_id, tokens)
        self._rows(group, report, now)
        self._tokens(group, report, progress, now)
        for job_id, message in report.failed:
            self._finish(group, job_id, FinishReason.FAILED, message, progress, now)
        for done in report.ops:
            self._operation(group, done, now)
        return progress

    # --- rows and tokens ---------------------------------------------------------------------

    def _began(self, group: Group, job_id: str, tokens: int) -> None:
        """Its first row found KV in the cache. What it had had itself before is nobody's saving."""
        job = group.jobs.get(job_id)
        if job is not None and not job.peak:
            job.cached = min(tokens, job.prompt_len)
            self._counters["tokens.cached"] += job.cached

    def _rows(self, group: Group, report: Report, now: float) -> None:
        if not report.rows:
            return
        work = work_of(report.rows)
        if group.pace.counts:
            group.pace.observe(report.seconds, group.cost.seconds(work))
        group.cost.observe(work, report.seconds)
        share = _Share(group.cost, work, report.seconds)
        # Everything that a decode comes by on its way is a local: one per row and iteration.
        find, policy, limits = group.jobs.get, group.policy, group.policy.limits()
        drop_device, decode_s, shared = KvOpKind.DROP_DEVICE, share.decode, group.queue.shared
        for job_id, new_tokens, computed in report.rows:
            job = find(job_id)
            if job is None:
                continue
            if computed > job.peak:
                again = job.peak - (computed - new_tokens)
                job.peak = computed
            else:
                again = new_tokens
            if again > 0:
                self._counters["tokens.recomputed"] += again
            if job.op is not drop_device:  # else it is gone by now
                job.computed = computed
            # A row may have had nothing to do, for want of a block.
            seconds = decode_s if new_tokens <= 1 else share.prefill(computed, new_tokens)
            job.attained += seconds
            if shared:
                group.queue.charge(job, seconds)
            job.used = used = job.used + seconds
            level = job.level
            if used >= limits[level]:
                policy.sink(job)
                job.sunk = True
                group.queue.update(job)
                if job.level != level:
                    self._tell(job, EventKind.DEMOTED, now)

    def _tokens(self, group: Group, report: Report, progress: Progress, now: float) -> None:
        find, tokens, came = group.jobs.get, progress.tokens, group.came
        for position, (job_id, index, token, finish) in enumerate(report.sampled):
            job = find(job_id)
            if job is None:
                continue
            output = job.output
            length = len(output)
            if index == length:
                output.append(token)
                length += 1
                tokens.append((job_id, index, token, position))
                if not index:
                    group.prefixes.note(job)
                if came and job in came:
                    _, iteration = came.pop(job)
                    if index:
                        self._counters[f"pauses.{group.iteration - iteration - 1}"] += 1
            elif index > length:
                text = f"the worker left out tokens {length} to {index - 1}"
                self._finish(group, job_id, FinishReason.FAILED, text, progress, now)
                continue
            if finish is not None:
                self._finish(group, job_id, finish, "", progress, now)
            elif job.prompt_len + length >= job.max_len:
                self._finish(group, job_id, FinishReason.LENGTH, "", progress, now)

    def _finish(
        self,
        group: Group,
        job_id: str,
        reason: FinishReason,
        error: str,
        progress: Progress,
        now: float,
    ) -> None:
        job = group.jobs.get(job_id)
        if job is not None:
            self._end(job, reason, now)
            progress.finished.append(Finished(job_id, reason, error))

    # --- KV operations -----------------------------------------------------------------------

    def _operation(self, group: Group, done: OpDone, now: float) -> None:
        op = group.ops.pop(done.op_id)
        migration = op.migration
        channel = group.channel(op.kind)
        if channel is not None:
            channel.end(op.began, done.seconds if done.bytes else 0.0, op.blocks)
            group.pace.copies -= op.kind is KvOpKind.COPY_OUT
        if op.leftover is not None:
            group.device_used -= op.leftover.device
            group.host_used -= op.leftover.host
            came_back = group.jobs.get(op.job_id)
            if came_back is not None:
                came_back.op = None
            return
        if migration is not None and op.kind is KvOpKind.UPLOAD and not migration.over:
            self._migrations.came(migration, done, now)
            return
        job = op.job
        if job is None or not job.live:
            if migration is not None and op.kind is KvOpKind.EXPORT:
                self._migrations.sent(migration, done, now)
            leftover = group.to_release.get(op.job_id)
            if leftover is not None:
                leftover.busy = False
            return
        job.op = None
        match op.kind:
            case KvOpKind.OFFLOAD:
                self._offloaded(group, job, done, now)
            case KvOpKind.COPY_OUT:
                self._copied_out(group, job, done, now)
            case KvOpKind.UPLOAD:
                self._uploaded(group, job, done, now)
            case KvOpKind.EXPORT:
                self._exported(group, job, done)
                assert migration is not None
                self._migrations.sent(migration, done, now)
            case KvOpKind.DROP_DEVICE:
                job.computed = 0
                if job.kv is KvState.DROPPED:
                    self._tell(job, EventKind.DROPPED, now)
            case KvOpKind.DROP_HOST:
                job.host_tokens = 0
                group.book_host(job, 0)
                if job.kv is KvState.HOST:
                    group.set_kv(job, KvState.DROPPED)
                    self._tell(job, EventKind.DROPPED, now)

    def _offloaded(self, group: Group, job: Job, done: OpDone, now: float) -> None:
        if done.status is not KvStatus.OK:
            # The host is fuller than was counted, or gone.
            group.set_kv(job, KvState.DEVICE)
            group.book_host(job, group.blocks(job.host_tokens))
            group.host_reopens = now + _HOST_PAUSE_S
            return
        self._count(KvOpKind.OFFLOAD, max(0, done.tokens - job.host_tokens), done)
        job.host_tokens, job.computed = done.tokens, 0
        group.book_host(job, group.blocks(done.tokens))
        group.set_kv(job, KvState.HOST if done.tokens else KvState.DROPPED)
        self._tell(job, EventKind.OFFLOADED, now)

    def _copied_out(self, group: Group, job: Job, done: OpDone, now: float) -> None:
        if done.status is KvStatus.OK:
            self._count(KvOpKind.COPY_OUT, max(0, done.tokens - job.host_tokens), done)
            job.host_tokens = done.tokens
        else:
            group.host_reopens = now + _HOST_PAUSE_S
        group.book_host(job, group.blocks(job.host_tokens))

    def _exported(self, group: Group, job: Job, done: OpDone) -> None:
        if done.status is KvStatus.OK:
            self._count(KvOpKind.EXPORT, done.tokens, done)
        job.host_tokens = done.tokens
        group.book_host(job, group.blocks(job.host_tokens))

    def _uploaded(self, group: Group, job: Job, done: OpDone, now: float) -> None:
        if done.status is KvStatus.OK:
            self._count(KvOpKind.UPLOAD, done.tokens, done)
            job.computed = done.tokens
            job.held_from = job.attained
            group.set_kv(job, KvState.DEVICE)
            self._tell(job, EventKind.UPLOADED, now)
        elif done.status is KvStatus.LOST:
            job.host_tokens = 0
            group.book_host(job, 0)
            group.set_kv(job, KvState.DROPPED)
            self._tell(job, EventKind.DROPPED, now)
        else:
            group.set_kv(job, KvState.HOST)

    def _count(self, kind: KvOpKind, tokens: int, done: OpDone) -> None:
        self._counters[f"tokens.{kind}"] += tokens
        self._counters[f"bytes.{kind}"] += done.bytes


def _check_sense(group: Group, report: Report) -> None:
    """Raises `ProtocolError` for numbers that no worker can have measured."""
    if not 0 <= report.seconds < math.inf:
        raise ProtocolError(f"an iteration of {report.seconds} s")
    find, most = group.jobs.get, group.max_tokens
    for job_id, new_tokens, computed in report.rows:
        job = find(job_id)
        if job is not None and (computed > job.max_len or new_tokens > min(computed, most)):
            raise ProtocolError(
                f"a row of {new_tokens} tokens and {computed} in all for job {job_id}, which may "
                f"have {job.max_len}"
            )
    for job_id, tokens in report.cached:
        job = find(job_id)
        if job is not None and tokens >= job.max_len:
            raise ProtocolError(f"{tokens} tokens in the cache for job {job_id}")
    for done in report.ops:
        op = group.ops[done.op_id]
        job = op.migration.job if op.job is None and op.migration is not None else op.job
        if job is not None and done.tokens > job.max_len:
            raise ProtocolError(f"KV operation {done.op_id} moved {done.tokens} tokens of a job")


class _Share:
    """What each row of an iteration is charged: its time as if every other row had decoded."""

    def __init__(self, cost: CostModel, work: Work, seconds: float) -> None:
        self._cost, self._seconds = cost, seconds
        self.decode = seconds
        if work.prefill_tokens:
            self._whole = cost.seconds(work)
            self._others = cost.seconds(Work(0, 0, work.rows, work.context))
            self.decode = self._part(self._others)

    def prefill(self, computed: int, new_tokens: int) -> float:
        """Seconds of a chunk that ended with `computed` tokens in device KV."""
        alone = self._cost.seconds(chunk(computed - new_tokens, new_tokens))
        return self._part(self._others + alone - self._cost.seconds(Work(0, 0, 0, 0)))

    def _part(self, seconds: float) -> float:
        return self._seconds * min(1.0, seconds / self._whole) if self._whole > 0 else self._seconds
