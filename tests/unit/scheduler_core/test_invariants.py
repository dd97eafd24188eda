"""Whatever happens, in whatever order: no job lost or run twice, no block counted twice, budgets
kept, tokens exactly once, and every job finishes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastserve.scheduler.core import (
    FinishReason,
    Inventory,
    JobSpec,
    JobState,
    KvStatus,
    KvStrategy,
    OpDone,
    Progress,
    ProtocolError,
    RejectReason,
    Report,
    RowResult,
    SampledToken,
    Scheduler,
    SchedulerConfig,
    WorkerInfo,
)
from fastserve.scheduler.core.policies import POLICIES
from support.worker_model import WorkerModel, token_of, worker_info

MAX_LEN = 64

# What a worker may get wrong so that its stream cannot be trusted any more.
_IMPOSSIBLE: dict[str, Callable[[Report], Report]] = {
    "an iteration left out": lambda report: dataclasses.replace(
        report, iteration=report.iteration + 1 if report.iteration else 10_000
    ),
    "a plan that was never sent": lambda report: dataclasses.replace(report, plan_id=10_000),
    "an operation that was never sent": lambda report: dataclasses.replace(
        report, ops=[*report.ops, OpDone(10_000, KvStatus.OK)]
    ),
    "an operation that ends twice": lambda report: dataclasses.replace(
        report, ops=[*report.ops, *(report.ops or [OpDone(10_000, KvStatus.OK)])]
    ),
}


class SchedulerMachine(RuleBasedStateMachine):
    """One scheduler, one or two workers, everything that can happen to them."""

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        kv_strategy=st.sampled_from(list(KvStrategy)),
        lease=st.integers(1, 5),
        partial=st.integers(1, 3),
        look_ahead=st.integers(1, 8),
        device_blocks=st.integers(16, 24),
        host_blocks=st.integers(0, 24),
        rows=st.integers(1, 5),
        budget=st.integers(1, 20),
    )
    def start(
        self,
        policy: str,
        kv_strategy: KvStrategy,
        lease: int,
        partial: int,
        look_ahead: int,
        device_blocks: int,
        host_blocks: int,
        rows: int,
        budget: int,
    ) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(
            SchedulerConfig(
                policy=policy,
                kv_strategy=kv_strategy,
                lease=lease,
                max_partial_prefills=partial,
                look_ahead=look_ahead,
                max_queued_jobs=12,
                starvation_s=0.5,
                levels=4,
            )
        )
        self.infos = {
            name: worker_info(
                name,
                device_blocks=device_blocks,
                host_blocks=host_blocks,
                max_num_seqs=rows,
                max_num_batched_tokens=budget,
                max_model_len=MAX_LEN,
            )
            for name in ("w0", "w1")
        }
        self.lengths: dict[str, int] = {}
        self.cached: dict[str, int] = {}
        self.workers: dict[str, WorkerModel] = {}
        self.away: dict[str, tuple[WorkerModel, Inventory]] = {}
        self.output: dict[str, list[int]] = {}
        self.ended: dict[str, FinishReason] = {}
        self.count = 0
        self._connect(self.infos["w0"])

    def _connect(self, info: WorkerInfo) -> None:
        model = WorkerModel(info, self.lengths, self.scheduler.job, self.cached)
        self.workers[info.worker_id] = model
        model.peers = self.workers
        self.scheduler.add_worker(info, Inventory(place=model.place), self.now)

    def _absorb(self, progress: Progress) -> None:
        for job_id, index, token, _ in progress.tokens:
            output = self.output[job_id]
            assert job_id not in self.ended
            assert index == len(output), "a token lost or repeated"
            assert token == token_of(job_id, index), "a token of another job"
            output.append(token)
        for finished in progress.finished:
            assert finished.job_id not in self.ended, "ended twice"
            self.ended[finished.job_id] = finished.reason

    def _plan(self, name: str) -> None:
        plan = self.scheduler.plan(name, self.now)
        if plan is not None:
            if plan.may_leave:
                assert self.scheduler.draining(name)
                assert self.scheduler.jobs_of(name) == (0, 0), "its jobs are not all gone"
            assert len({op.op_id for op in plan.ops}) == len(plan.ops)
            for row in plan.rows:
                assert row.job.worker_id == name, "a job at two workers"
            self.workers[name].receive(plan)

    def _step(self, name: str, *, boundary: bool = True) -> bool:
        """One iteration; False if there was nothing to do."""
        report = self.workers[name].step(boundary=boundary)
        self.now += 0.010
        if report is None:
            return False
        self._absorb(self.scheduler.on_report(name, report, self.now))
        return True

    def _tell(self, name: str) -> None:
        """What ended beside the iteration."""
        report = self.workers[name].ended_report()
        if report is not None:
            self._absorb(self.scheduler.on_report(name, report, self.now))

    def _one_row(self, data: st.DataObject, name: str) -> str | None:
        """A job that will have a row in the next iteration."""
        model = self.workers[name]
        model.apply_all()
        if model.plan is None or not model.lease:
            return None
        ready = [
            job.job_id
            for job, _ in model._live_rows()
            if (known := self.scheduler.job(job.job_id)) is not None and known.worker_id == name
        ]
        return data.draw(st.sampled_from(ready)) if ready else None

    @rule(
        count=st.sampled_from([1, 1, 2, 4, 8]),
        prompt=st.integers(1, 40),
        max_tokens=st.integers(1, 24),
        length=st.integers(1, 30),
        cached=st.sampled_from([0, 0, 4, 30, 100]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        deadline=st.sampled_from([None, None, None, 0.3]),
        tenant=st.sampled_from(["default", "default", "acme", "zoo"]),
        service_class=st.sampled_from(["interactive", "default", "batch", "of another deployment"]),
    )
    def submit(self, count: int, **job: Any) -> None:
        for _ in range(count):
            self._submit(**job)

    def _submit(
        self,
        *,
        prompt: int,
        max_tokens: int,
        length: int,
        cached: int,
        priority: int,
        deadline: float | None,
        tenant: str,
        service_class: str,
    ) -> None:
        self.count += 1
        job_id = f"j{self.count}"
        self.lengths[job_id] = length
        self.cached[job_id] = cached
        spec = JobSpec(
            job_id,
            tuple(range(prompt)),
            max_tokens,
            self.now,
            tenant=tenant,
            tenant_weight=2.0 if tenant == "acme" else 1.0,
            service_class=service_class,
            priority=priority,
            deadline=None if deadline is None else self.now + deadline,
        )
        rejection = self.scheduler.submit(spec, self.now)
        if rejection is None:
            self.output[job_id] = []
        elif rejection.reason is RejectReason.QUEUE_FULL:
            waiting = sum(j.state is not JobState.RUNNING for j in self.scheduler.jobs())
            assert waiting >= 12 and rejection.retry_after_s >= 1
        else:
            none = all(self.scheduler.draining(name) for name in self.workers)
            assert (rejection.reason is RejectReason.NO_WORKER and none) or (
                rejection.reason is RejectReason.DEADLINE and deadline is not None
            )

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), iterations=st.integers(1, 6), plans=st.booleans())
    def iterate(self, data: st.DataObject, iterations: int, plans: bool) -> None:
        """Iterations run, with or without hearing from the scheduler in between."""
        name = data.draw(st.sampled_from(sorted(self.workers)))
        self._plan(name)
        for _ in range(iterations):
            self._step(name)
            if plans:
                self._plan(name)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), iterations=st.integers(1, 6), plans=st.integers(1, 2), end=st.booleans())
    def plans_come_meanwhile(
        self, data: st.DataObject, iterations: int, plans: int, end: bool
    ) -> None:
        """Too late for the iteration under way, whose report is one of an old plan. What they do to
        jobs without a row begins at once; copies may end meanwhile."""
        name = data.draw(st.sampled_from(sorted(self.workers)))
        model = self.workers[name]
        for _ in range(iterations):
            model.apply_all()
            model.begin()
            for _ in range(plans):
                self._plan(name)
                if end:
                    model.finish_copies()
                    self._tell(name)
            self._step(name, boundary=False)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def replan(self, data: st.DataObject) -> None:
        """A plan that the worker gets while it is busy."""
        self._plan(data.draw(st.sampled_from(sorted(self.workers))))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), what=st.sampled_from(sorted(_IMPOSSIBLE)))
    def an_impossible_report(self, data: st.DataObject, what: str) -> None:
        """Nothing changes by it: what is true can still be told afterwards."""
        name = data.draw(st.sampled_from(sorted(self.workers)))
        report = self.workers[name].step()
        if report is None:
            return
        before = _state_of(self.scheduler)
        with pytest.raises(ProtocolError):
            self.scheduler.on_report(name, _IMPOSSIBLE[what](report), self.now)
        assert _state_of(self.scheduler) == before
        self._absorb(self.scheduler.on_report(name, report, self.now))

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def a_report_of_strangers(self, data: st.DataObject) -> None:
        """Jobs that are unknown or over are no news, and neither are tokens that were told."""
        name = data.draw(st.sampled_from(sorted(self.workers)))
        report = self.workers[name].step()
        if report is None:
            return
        told = [
            SampledToken(job.job_id, 0, job.output[0])
            for job in self.scheduler.jobs()
            if job.output
        ]
        odd = dataclasses.replace(
            report,
            rows=[
                *report.rows,
                RowResult("stranger", 1, 9),
                *(RowResult(i, 1, 9) for i in self.ended),
            ],
            sampled=[*told, SampledToken("stranger", 0, 1), *report.sampled],
            failed=[("stranger", "not finite"), *((i, "too late") for i in self.ended)],
        )
        self._absorb(self.scheduler.on_report(name, odd, self.now))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), gap=st.booleans())
    def a_row_fails(self, data: st.DataObject, gap: bool) -> None:
        """By what the worker says, or since a token is missing: the job fails, alone."""
        name = data.draw(st.sampled_from(sorted(self.workers)))
        job_id = self._one_row(data, name)
        if job_id is None:
            return
        report = self.workers[name].step()
        assert report is not None
        sampled = [token for token in report.sampled if token[0] != job_id]
        if gap:
            skipped = SampledToken(job_id, len(self.output[job_id]) + 1, 7)
            odd = dataclasses.replace(report, sampled=[*sampled, skipped])
        else:
            odd = dataclasses.replace(report, sampled=sampled, failed=[(job_id, "not finite")])
        self.workers[name].held[job_id].finished = True
        self._absorb(self.scheduler.on_report(name, odd, self.now))
        assert self.ended[job_id] is FinishReason.FAILED

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def a_row_stalls(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        job_id = self._one_row(data, name)
        if job_id is not None:
            self.workers[name].stalls.add(job_id)
            self._step(name)

    @precondition(lambda self: self.workers)
    @rule(
        data=st.data(),
        trouble=st.sampled_from(
            ["host_loses", "host_refuses", "device_refuses", "sends_in_vain", "sends_unheard"]
        ),
        iterations=st.integers(1, 6),
    )
    def copies_fail(self, data: st.DataObject, trouble: str, iterations: int) -> None:
        """LOST, NO_HOST_SPACE, NO_DEVICE_SPACE or NOT_SENT, for some iterations."""
        name = data.draw(st.sampled_from(sorted(self.workers)))
        model = self.workers[name]
        setattr(model, trouble, True)
        for _ in range(iterations):
            self._plan(name)
            model.apply_all()
            model.finish_copies()
            self._step(name)
        setattr(model, trouble, False)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def copies_end(self, data: st.DataObject) -> None:
        model = self.workers[data.draw(st.sampled_from(sorted(self.workers)))]
        model.finish_copies()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.output:
            return
        job_id = data.draw(st.sampled_from(sorted(self.output)))
        if self.scheduler.cancel(job_id, self.now):
            assert job_id not in self.ended
            self.ended[job_id] = FinishReason.CANCELLED
        else:
            assert job_id in self.ended

    @rule(seconds=st.sampled_from([0.05, 0.6]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for finished in self.scheduler.expire(self.now):
            assert finished.job_id not in self.ended
            self.ended[finished.job_id] = finished.reason

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), died=st.booleans(), host_lost=st.booleans())
    def lose_worker(self, data: st.DataObject, died: bool, host_lost: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        model = self.workers.pop(name)
        self.scheduler.remove_worker(name, self.now)
        self.away[name] = (model, model.reconnect(died=died, host_lost=host_lost))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), draining=st.booleans())
    def drain(self, data: st.DataObject, draining: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        self.scheduler.drain(name, draining, self.now)

    @rule()
    def balance(self) -> None:
        before = {job.job_id: job.worker_id for job in self.scheduler.jobs()}
        self.scheduler.balance(self.now)
        for job in self.scheduler.jobs():
            if job.worker_id != before[job.job_id] and job.worker_id is not None:
                assert not self.scheduler.draining(job.worker_id), "moved to where it has to leave"

    @rule(data=st.data())
    def worker_comes(self, data: st.DataObject) -> None:
        absent = sorted(set(self.infos) - set(self.workers))
        if not absent:
            return
        name = data.draw(st.sampled_from(absent))
        if name in self.away:
            model, inventory = self.away.pop(name)
            self.workers[name] = model
            self.scheduler.add_worker(self.infos[name], inventory, self.now)
        else:
            self._connect(self.infos[name])

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        live = {job.job_id for job in self.scheduler.jobs()}
        assert live == set(self.output) - set(self.ended), "a job was lost"
        assert len(list(self.scheduler.level_depths())) == len(self.scheduler.level_quanta())
        self.scheduler.drain_events()

    def teardown(self) -> None:
        """Left alone with a worker, everything ends, and nothing stays behind."""
        if not hasattr(self, "scheduler"):
            return
        for name in sorted(self.infos):
            if name in self.away and not self.workers:
                model, inventory = self.away.pop(name)
                self.workers[name] = model
                self.scheduler.add_worker(self.infos[name], inventory, self.now)
        for name in self.workers:
            self.scheduler.drain(name, False, self.now)
        for _ in range(4000):
            busy = False
            for name, model in self.workers.items():
                self._plan(name)
                model.apply_all()
                model.finish_copies()
                busy |= self._step(name)
            self.counts_agree()
            if not busy and not list(self.scheduler.jobs()):
                break  # the last releases have ended, too
        assert not list(self.scheduler.jobs()), "jobs that never end"
        for job_id, reason in self.ended.items():
            if reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert self.output[job_id] == [
                    token_of(job_id, index) for index in range(len(self.output[job_id]))
                ]
                assert self.output[job_id], "ended without a token"
        for model in self.workers.values():
            assert not model.held, "something stays behind at the worker"
            assert not model.imports, "something stays behind on its host"
            assert model.free_device == model.info.device_blocks


def _state_of(scheduler: Scheduler) -> object:
    """All that decisions depend on."""
    fields = (
        "job_id", "state", "kv", "op", "key", "attained", "used", "computed", "host_tokens",
        "booked", "host_booked", "peak", "output",
    )  # fmt: skip
    jobs = [tuple(repr(getattr(job, name)) for name in fields) for job in scheduler.jobs()]
    of_group = ("device_used", "host_used", "plan_id", "iteration", "outstanding", "to_release")
    groups = [
        (*(repr(getattr(group, name)) for name in of_group), list(group.ops), list(group.queue))
        for group in scheduler._groups.values()
    ]
    return jobs, groups, dict(scheduler.counters)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    # Shrinking sequences of forty steps takes minutes; `phases` can be extended when one is found.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    print_blob=True,
)
