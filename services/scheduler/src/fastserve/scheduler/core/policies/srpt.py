"""Shortest remaining processing time: an oracle to compare with."""

from __future__ import annotations

from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.policies.base import Key, Policy, class_rank


class Srpt(Policy):
    """Takes `max_tokens` for the length of the output, which is true in simulations and in
    benchmarks that ignore end-of-sequence tokens. Long jobs may starve."""

    name = "srpt"
    preemptive = True

    def key(self, job: Job) -> Key:
        return (class_rank(job), job.spec.priority, job.limit, job.seq)

    def quanta(self) -> list[float]:
        return [0.0]

    def admit(self, job: Job) -> None:
        """In decode iterations. Fixed until it runs again: the cost model goes on learning."""
        job.limit = job.max_len - job.known_len
        if not job.output:
            job.limit += self.cost.prefill(job.remaining, self.budget) / self.cost.decode_s

    def limits(self) -> list[float]:
        return [0.0] * self.config.levels  # less is left after every iteration

    def sink(self, job: Job) -> None:
        self.admit(job)
