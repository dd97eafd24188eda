"""The scheduler: jobs in, plans out."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

from fastserve.scheduler.core.backlog import queued_work_s
from fastserve.scheduler.core.config import SchedulerConfig
from fastserve.scheduler.core.cost_model import CostModel
from fastserve.scheduler.core.deadlines import Deadlines, least_seconds
from fastserve.scheduler.core.errors import ProtocolError
from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.integrity import check
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.migrations import Migrations
from fastserve.scheduler.core.moves import Moves
from fastserve.scheduler.core.planner import make_plan
from fastserve.scheduler.core.policies import policy_named
from fastserve.scheduler.core.reports import ReportReader
from fastserve.scheduler.core.types import (
    Event,
    EventKind,
    Finished,
    FinishReason,
    Inventory,
    JobSpec,
    JobState,
    KvPlace,
    KvState,
    Plan,
    PreemptReason,
    Progress,
    Rejection,
    RejectReason,
    Report,
    WorkerInfo,
)

_END_STATES = {
    FinishReason.CANCELLED: JobState.CANCELLED,
    FinishReason.FAILED: JobState.FAILED,
    FinishReason.DEADLINE: JobState.CANCELLED,
}
# Many per iteration: not by the slower way through the class.
_EVENT = partial(tuple.__new__, Event)
_LONGEST_RETRY_S = 60
_PASSED = "the deadline of the request has passed"
_TOO_LATE = "the deadline of the request cannot be met any more"


class Scheduler:
    """Decides which jobs run and where their KV cache lies, for any number of worker groups."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Raises `UnknownPolicyError`."""
        policy_named(config.policy)
        self.config = config
        self.counters: Counter[str] = Counter()
        self._jobs: dict[str, Job] = {}  # live ones
        self._groups: dict[str, Group] = {}
        self._homeless: dict[Job, None] = {}  # live, without a group
        self._deadlines = Deadlines(self._group_of)
        self._events: list[Event] = []
        self._places = itertools.count()
        self._finish_gap_s = 0.0  # average time between two ends
        self._last_finish: float | None = None
        self._migrations = Migrations(self._groups, self._tell, self.counters)
        self._moves = Moves(self._groups, self._migrations, self._tell, self.counters)
        self._past_kv_wait = (0.0, 0.0)  # of workers that are gone; see `kv_wait`
        self._reader = ReportReader(self._end, self._tell, self.counters, self._migrations)

    # --- workers -----------------------------------------------------------------------------

    def add_worker(
        self, info: WorkerInfo, inventory: Inventory, now: float, *, draining: bool = False
    ) -> list[str]:
        """A worker whose stream has just opened. Jobs without a group may go to it, and jobs of
        other groups of which it has more than they.

        draining: it takes no new jobs; those without a group that it holds go on there.
        Returns the jobs of its inventory that are over or elsewhere; they are released. Raises
        `ProtocolError` if it is there already, or holds more than it has.
        """
        if info.worker_id in self._groups:
            raise ProtocolError(f"worker {info.worker_id} is connected already")
        device, host = inventory.device_tokens, inventory.host_tokens
        group = Group(info, self.config, lambda: next(self._places), planned_at=now)
        if group.blocks_held(inventory) > info.device_blocks:
            raise ProtocolError(f"worker {info.worker_id} holds more blocks than it has")
        group.draining, group.place = draining, inventory.place
        self._groups[info.worker_id] = group
        for job in list(self._homeless):
            wanted = not draining or job.job_id in device or job.job_id in host
            if wanted and group.fits(job.max_len):
                del self._homeless[job]
                self._migrations.settle(group, job, now)
        for job_id in dict.fromkeys([*device, *host]):
            self._claim(group, job_id, max(device.get(job_id, 0), host.get(job_id, 0)), now)
        unknown = self._take_stock(group, inventory)
        self._moves.balance(now)
        return unknown

    def _claim(self, group: Group, job_id: str, tokens: int, now: float) -> None:
        """A job that went on elsewhere, or has yet to, comes back to where more of it is."""
        job = self._jobs.get(job_id)
        there = None if job is None else self._group_of(job)
        if job is None or there is None or there is group or group.draining:
            return
        if tokens - max(job.computed, job.host_tokens) > group.info.block_size:
            self._migrations.move(job, there, group, PreemptReason.BALANCE, now)

    def _take_stock(self, group: Group, inventory: Inventory) -> list[str]:
        """Book what the worker holds, then what its jobs need beyond."""
        device, host = inventory.device_tokens, inventory.host_tokens
        unknown, kept = [], []
        for job_id in dict.fromkeys([*device, *host]):
            on_device, on_host = device.get(job_id, 0), host.get(job_id, 0)
            job = self._jobs.get(job_id)
            if job is None or job.worker_id != group.info.worker_id:
                blocks, host_blocks = group.blocks(on_device), group.blocks(on_host)
                group.device_used += blocks
                group.host_used += host_blocks
                group.leave_behind(job_id, blocks, host_blocks)
                unknown.append(job_id)
                continue
            job.named = True
            job.host_tokens = on_host
            group.book_host(job, group.blocks(on_host))
            job.computed = min(on_device, job.known_len - 1)
            job.peak = max(job.peak, on_device, on_host)
            job.kv = KvState.HOST if on_host else KvState.DROPPED
            if on_device:
                job.booked = group.blocks(on_device)
                group.device_used += job.booked
                kept.append(job)
        for job in kept:
            more = group.need(job, 0) - job.booked
            job.kv = KvState.DEVICE
            group.resident[job] = None
            if more <= group.free:
                group.book(job)
            else:
                group.to_drop[job] = None
        return unknown

    def remove_worker(self, worker_id: str, now: float) -> None:
        """Its stream is gone. Its jobs go to other groups, or wait until one comes."""
        group = self._groups.pop(worker_id)
        waited, ran = self._past_kv_wait
        self._past_kv_wait = (waited + group.kv_wait_s, ran + group.row_s)
        self._homeless.update(dict.fromkeys(self._moves.lose(group, now)))

    def drain(self, worker_id: str, draining: bool, now: float) -> None:
        """Give the group no new jobs and let those that it has go to others, or end that.

        Raises KeyError if it is not connected.
        """
        group = self._groups[worker_id]
        group.draining, group.dismissed, group.restate = draining, False, True
        self._migrations.turn(group, draining=draining)
        for job in list(self._homeless):
            home = self._moves.home(job, now)
            if home is not None:
                del self._homeless[job]
                self._migrations.settle(home, job, now)
        self._moves.balance(now)

    def take_kv_at(self, worker_id: str, place: KvPlace | None) -> None:
        """Where a group takes KV of others from now on. Raises KeyError if it is not connected."""
        self._groups[worker_id].place = place
        for other in self._groups.values():  # it may have been out of reach where it was before
            other.unreachable.pop(worker_id, None)

    def draining(self, worker_id: str) -> bool:
        """Raises KeyError if it is not connected."""
        return self._groups[worker_id].draining

    def balance(self, now: float) -> None:
        """Let jobs go where they end sooner. To be called a few times a second."""
        self._moves.balance(now)

    def jobs_of(self, worker_id: str) -> tuple[int, int]:
        """Jobs of a group, and how many of them have a row. Raises KeyError."""
        group = self._groups[worker_id]
        return len(group.jobs), group.running

    def moving_cost(self, worker_id: str) -> int:
        """Tokens of KV cache that would have to be copied or computed again if the group ended, and
        one for each of its jobs; -1: it is draining, and nothing is lost. Raises KeyError."""
        group = self._groups[worker_id]
        if group.draining:
            return -1
        held = sum(max(job.computed, job.host_tokens) for job in group.jobs.values())
        return held + len(group.jobs)

    def _group_of(self, job: Job) -> Group | None:
        return None if job.worker_id is None else self._groups.get(job.worker_id)

    # --- jobs --------------------------------------------------------------------------------

    def submit(self, spec: JobSpec, now: float) -> Rejection | None:
        """Take a job, or say why not."""
        job_id = spec.job_id
        if not spec.prompt or spec.max_tokens < 1:
            return Rejection(RejectReason.INVALID, "a job needs a prompt and max_tokens >= 1")
        if job_id in self._jobs or any(
            group.holds(job_id) or job_id in group.coming for group in self._groups.values()
        ):
            return Rejection(RejectReason.ALREADY_EXISTS, f"job {job_id} exists")
        if not self._groups:
            return Rejection(RejectReason.NO_WORKER, "no worker is connected", 1)
        if all(group.draining for group in self._groups.values()):
            return Rejection(RejectReason.NO_WORKER, "all workers are about to leave", 1)
        job = Job(spec, next(self._places), now)
        group = self._moves.home(job, now)
        if group is None:
            most = max(self._longest(group) for group in self._groups.values())
            if job.max_len <= most:
                text = "the only worker that is large enough is about to leave"
                return Rejection(RejectReason.NO_WORKER, text, 1)
            return Rejection(
                RejectReason.TOO_LONG,
                f"prompt and output may have {most} tokens together, not {job.max_len}",
            )
        if spec.deadline is not None and now + least_seconds(group, spec) >= spec.deadline:
            return Rejection(RejectReason.DEADLINE, _TOO_LATE)
        waiting = len(self._jobs) - sum(group.running for group in self._groups.values())
        if waiting >= self.config.max_queued_jobs:
            return Rejection(
                RejectReason.QUEUE_FULL,
                f"{waiting} jobs are waiting, which is the limit",
                self._retry_after(),
            )
        self._jobs[job.job_id] = job
        group.policy.join(job)
        self._migrations.settle(group, job, now)
        self._deadlines.watch(job)
        self._tell(job, EventKind.QUEUED, now)
        return None

    def restore(
        self,
        spec: JobSpec,
        output: Sequence[int],
        *,
        level: int,
        attained: float,
        preemptions: int,
        now: float,
    ) -> None:
        """A live job of a former leader. Called in the order that they had in their levels."""
        job = self._jobs[spec.job_id] = Job(spec, next(self._places), now)
        job.output.extend(output)
        job.level = min(level, self.config.levels - 1)
        job.attained, job.preemptions = attained, preemptions
        job.place = next(self._places)
        if output:
            # Something of it may be with a worker; what, that worker will say.
            job.state, job.kv, job.peak = JobState.PREEMPTED, KvState.DROPPED, job.known_len - 1
        group = self._moves.home(job, now)
        if group is None:
            self._homeless[job] = None
        else:
            self._migrations.settle(group, job, now)
        self._deadlines.watch(job)
        self._tell(job, EventKind.QUEUED, now)

    def cancel(self, job_id: str, now: float) -> bool:
        """End a job. False if it is over or unknown."""
        job = self._jobs.get(job_id)
        if job is None:
            return False
        self._end(job, FinishReason.CANCELLED, now)
        return True

    def expire(self, now: float) -> list[Finished]:
        """End the jobs whose deadline has come, or cannot be met any more."""
        ended = []
        for job in self._deadlines.due(now):
            self._end(job, FinishReason.DEADLINE, now)
            passed = job.spec.deadline is not None and job.spec.deadline <= now
            text = _PASSED if passed else _TOO_LATE
            ended.append(Finished(job.job_id, FinishReason.DEADLINE, text))
        return ended

    def _end(self, job: Job, reason: FinishReason, now: float) -> None:
        group = self._group_of(job)
        if group is None:
            del self._homeless[job]
        else:
            self._migrations.detach(group, job, over=True)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._moves.lengths.note(len(job.output))
        job.state = _END_STATES.get(reason, JobState.FINISHED)
        del self._jobs[job.job_id]
        if self._last_finish is not None:
            self._finish_gap_s += 0.1 * (now - self._last_finish - self._finish_gap_s)
        self._last_finish = now
        self._tell(job, EventKind.FINISHED, now)

    def _retry_after(self) -> int:
        """Seconds until about a tenth of those that wait may have ended."""
        seconds = self._finish_gap_s * self.config.max_queued_jobs / 10
        return min(_LONGEST_RETRY_S, max(1, math.ceil(seconds)))

    @staticmethod
    def _longest(group: Group) -> int:
        return min(group.info.max_model_len, group.info.device_blocks * group.info.block_size)

    # --- iterations --------------------------------------------------------------------------

    def on_report(self, worker_id: str, report: Report, now: float) -> Progress:
        """Raises `ProtocolError` for what the worker cannot have seen."""
        return self._reader.apply(self._groups[worker_id], report, now)

    def plan(self, worker_id: str, now: float) -> Plan | None:
        """What the worker should do from now on; None: it may go on as it does."""
        group = self._groups[worker_id]
        self._migrations.land(group, now)
        if group.draining and not group.dismissed and not group.busy:
            group.dismissed = group.restate = True
        return make_plan(group, now, self._tell, self.counters)

    def patience_s(self, worker_id: str) -> float | None:
        """Seconds that what the worker was told to do next may well take; None: nothing.

        Raises KeyError if it is not connected.
        """
        group = self._groups[worker_id]
        rows = any(plan.lease_left and plan.rows for plan in group.plans)
        if not rows and not group.ops:
            return None
        rate = group.cost.prefill_tokens_per_s
        return group.cost.decode_s + (group.max_tokens / rate if rate else 0.0)

    # --- looking in --------------------------------------------------------------------------

    def job(self, job_id: str) -> Job | None:
        """A live job."""
        return self._jobs.get(job_id)

    def jobs(self) -> Iterable[Job]:
        """All live jobs."""
        return self._jobs.values()

    def kv_wait(self) -> tuple[float, float]:
        """Seconds that jobs among the first of the order waited for KV on its way, and seconds of
        execution (with a row), all jobs together. Neither ever falls.

        By iterations: a plan takes effect with the next one, whatever copies take until then.
        """
        waited, ran = self._past_kv_wait
        groups = self._groups.values()
        return (
            waited + sum(group.kv_wait_s for group in groups),
            ran + sum(group.row_s for group in groups),
        )

    def level_depths(self) -> list[int]:
        """Waiting jobs per level."""
        depths = [0] * len(self.level_quanta())
        for job in self._jobs.values():
            if job.state is not JobState.RUNNING:
                depths[min(job.level, len(depths) - 1)] += 1
        return depths

    def level_quanta(self) -> list[float]:
        """Seconds of service per level, of the first worker; 0 while none is known."""
        for group in self._groups.values():
            return group.policy.quanta()
        return [0.0] * self.config.levels

    def cost_model(self, worker_id: str) -> CostModel:
        """What is known of the times of a worker. Raises KeyError if it is not connected."""
        return self._groups[worker_id].cost

    def queued_work_s(self, worker_id: str) -> float:
        """Predicted seconds until a worker is through with the jobs that wait for it now.

        Raises KeyError if it is not connected.
        """
        return queued_work_s(self._groups[worker_id])

    def drain_events(self) -> list[Event]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def _tell(self, job: Job, kind: EventKind, now: float) -> None:
        self._events.append(_EVENT((job.spec.job_id, kind, job.level, now)))

    def check_integrity(self) -> None:
        """Count everything again. Raises `IntegrityError`; for tests, it looks at every job."""
        check(self._groups.values(), self._jobs.values(), self._homeless)
