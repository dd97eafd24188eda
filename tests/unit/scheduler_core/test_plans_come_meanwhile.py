"""Plans that come while an iteration runs, as most do: what they do to jobs without a row begins at
once, ends whenever it ends, and no block is missing for anybody. Memory is scarce."""

from __future__ import annotations

import random

import pytest

from fastserve.scheduler.core import (
    Inventory,
    JobSpec,
    KvOpKind,
    KvStrategy,
    Progress,
    Scheduler,
    SchedulerConfig,
)
from support.worker_model import WorkerModel, token_of, worker_info

STEPS = 600


class Life:
    """A scheduler and a worker, and jobs that come at random."""

    def __init__(self, policy: str, strategy: KvStrategy, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.scheduler = Scheduler(
            SchedulerConfig(policy=policy, kv_strategy=strategy, starvation_s=0.3, lease=3)
        )
        info = worker_info("w", device_blocks=20, host_blocks=60, max_num_seqs=3)
        self.lengths: dict[str, int] = {}
        self.model = WorkerModel(info, self.lengths, self.scheduler.job)
        self.scheduler.add_worker(info, Inventory(), 0.0)
        self.output: dict[str, int] = {}
        self.ended: set[str] = set()

    def submit(self) -> None:
        job_id = f"j{len(self.lengths)}"
        self.lengths[job_id] = 20
        prompt = range(self.random.randint(1, 25))
        # The later ones overtake: of several levels, so that rows change hands.
        priority = self.random.choice((0, 0, -1, -2))
        spec = JobSpec(job_id, prompt, 20, self.now, priority=priority)
        assert self.scheduler.submit(spec, self.now) is None
        self.output[job_id] = 0

    def plan(self) -> None:
        plan = self.scheduler.plan("w", self.now)
        if plan is not None:
            self.model.receive(plan)

    def absorb(self, progress: Progress) -> None:
        for job_id, index, token, _ in progress.tokens:
            assert index == self.output[job_id] and token == token_of(job_id, index)
            self.output[job_id] += 1
        self.ended |= {finished.job_id for finished in progress.finished}

    def step(self) -> None:
        """An iteration, and what comes in the middle of it."""
        self.model.apply_all()
        self.model.begin()
        for _ in range(self.random.choice((0, 1, 1, 2))):
            self.plan()
            if self.random.random() < 0.5:
                self.model.finish_copies()
                report = self.model.ended_report()
                if report is not None:
                    self.absorb(self.scheduler.on_report("w", report, self.now))
        report = self.model.step(boundary=False)
        self.now += 0.010
        if report is not None:
            self.absorb(self.scheduler.on_report("w", report, self.now))
        self.scheduler.check_integrity()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("policy", ["fastserve", "srpt", "skip-join-mlfq", "fcfs"])
@pytest.mark.parametrize("strategy", list(KvStrategy))
def test_what_begins_early_finds_its_blocks(strategy: KvStrategy, policy: str, seed: int) -> None:
    life = Life(policy, strategy, seed)
    while len(life.lengths) < 60 or len(life.ended) < 60:
        if len(life.lengths) < 60 and life.random.random() < 0.15:
            life.submit()
        if life.random.random() < 0.3:
            life.plan()
        life.step()
        assert life.now < 60.0, "jobs that never end"
    assert all(tokens == 20 for tokens in life.output.values())
    if strategy in (KvStrategy.PROACTIVE, KvStrategy.REACTIVE) and policy != "fcfs":
        assert life.model.early[KvOpKind.UPLOAD] > 10
