"""Several worker groups behind one scheduler, driven in lockstep."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from fastserve.scheduler.core import (
    CostSample,
    Inventory,
    JobSpec,
    KvOpKind,
    Scheduler,
    SchedulerConfig,
)
from support.worker_model import WorkerModel, token_of, worker_info


class Groups:
    """A scheduler and several worker models in lockstep: one iteration each per step."""

    def __init__(
        self,
        speeds: dict[str, float],
        config: dict[str, Any] | None = None,
        *,
        peers: bool = False,
        **worker: int,
    ) -> None:
        """peers: they can send KV to each other."""
        self.now = 0.0
        self.scheduler = Scheduler(SchedulerConfig(**{"starvation_s": 1e6, **(config or {})}))
        self.lengths: dict[str, int] = {}
        self.models: dict[str, WorkerModel] = {}
        self.tokens: dict[str, list[int]] = {}
        self.came: dict[str, list[int]] = {}  # job -> steps in which a token came
        self.steps = 0
        self.ended: set[str] = set()
        self.slow: set[str] = set()  # groups whose copies do not end
        self.ops: list[tuple[str, KvOpKind, str]] = []  # group, operation, job
        sizes = {"device_blocks": 256, "max_num_batched_tokens": 64, "max_model_len": 512}
        self._worker, self._peers = {**sizes, **worker}, peers
        for name, speed in speeds.items():
            self.add(name, speed)

    def add(self, name: str, speed: float = 1.0) -> None:
        """One more group."""
        info = dataclasses.replace(
            worker_info(name, **self._worker),
            prefill_sample=CostSample(1, 64, 64, 0.040 / speed),
            decode_sample=CostSample(1, 1, 64, 0.010 / speed),
        )
        model = self.models[name] = WorkerModel(info, self.lengths, self.scheduler.job)
        model.peers = self.models
        place = model.place if self._peers else None
        self.scheduler.add_worker(info, Inventory(place=place), self.now)

    def submit(self, job_id: str, prompt: int = 8, max_tokens: int = 60, **spec: Any) -> Any:
        self.lengths[job_id] = max_tokens
        self.tokens[job_id], self.came[job_id] = [], []
        return self.scheduler.submit(
            JobSpec(job_id, tuple(range(prompt)), max_tokens, self.now, **spec), self.now
        )

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.steps += 1
            self.now += 0.010
            self.scheduler.balance(self.now)
            for name, model in list(self.models.items()):
                plan = self.scheduler.plan(name, self.now)
                if plan is not None:
                    model.receive(plan)
                    self.ops += [(name, op.kind, op.job_id) for op in plan.ops]
                model.apply_all()
                if name not in self.slow:
                    model.finish_copies()
                report = model.step()
                if report is None:
                    continue
                progress = self.scheduler.on_report(name, report, self.now)
                for job_id, index, token, _ in progress.tokens:
                    assert index == len(self.tokens[job_id])
                    assert token == token_of(job_id, index)
                    self.tokens[job_id].append(token)
                    self.came[job_id].append(self.steps)
                self.ended |= {finished.job_id for finished in progress.finished}
            self.scheduler.check_integrity()

    def run(self) -> None:
        """Until all have ended."""
        for _ in range(5000):
            if not list(self.scheduler.jobs()):
                return
            self.step()
        raise AssertionError("jobs that never end")

    def at(self, name: str) -> set[str]:
        return {job.job_id for job in self.scheduler.jobs() if job.worker_id == name}

    def longest_pause(self, job_id: str) -> int:
        """Steps without a token between two tokens."""
        came = self.came[job_id]
        return max(after - before - 1 for before, after in itertools.pairwise(came))
