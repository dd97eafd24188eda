"""A random life of a scheduler, and a digest of everything that it decided."""

from __future__ import annotations

import hashlib
import random
import sys

from fastserve.scheduler.core import Inventory, JobSpec, Scheduler, SchedulerConfig
from support.worker_model import WorkerModel, worker_info

_CLASSES = ("interactive", "default", "default", "batch")


def decisions(policy: str, seed: int, steps: int = 250) -> str:
    """The same events for the same seed; what the scheduler makes of them is in the digest."""
    events = random.Random(seed)
    scheduler = Scheduler(SchedulerConfig(policy=policy, starvation_s=0.3, levels=4))
    lengths: dict[str, int] = {}
    workers = {
        name: WorkerModel(worker_info(name, host_blocks=12), lengths, scheduler.job)
        for name in ("w0", "w1")
    }
    for model in workers.values():
        scheduler.add_worker(model.info, Inventory(), 0.0)
    digest = hashlib.sha256()
    now = 0.0
    for step in range(steps):
        now += events.uniform(0.0, 0.02)
        for number in range(events.choice((0, 0, 1, 3))):
            job_id = f"j{step}.{number}"
            lengths[job_id] = events.randint(1, 20)
            spec = JobSpec(
                job_id,
                range(events.randint(1, 40)),
                20,
                now,
                service_class=events.choice(_CLASSES),
                priority=events.choice((0, 0, 0, -1)),
                deadline=now + 0.4 if events.random() < 0.1 else None,
            )
            digest.update(repr(scheduler.submit(spec, now)).encode())
        live = [job.job_id for job in scheduler.jobs()]
        if live and events.random() < 0.05:
            scheduler.cancel(events.choice(live), now)
        digest.update(repr(scheduler.expire(now)).encode())
        for name, model in workers.items():
            if events.random() < 0.02:
                scheduler.remove_worker(name, now)
                scheduler.add_worker(model.info, model.reconnect(died=events.random() < 0.5), now)
            plan = scheduler.plan(name, now)
            if plan is not None:
                rows = [(job.job_id, tokens) for job, tokens in plan.rows]
                digest.update(repr((plan.plan_id, plan.lease, rows, plan.ops)).encode())
                model.receive(plan)
            if events.random() < 0.5:
                model.finish_copies()
            report = model.step(events.uniform(0.005, 0.015))
            if report is not None:
                digest.update(repr(scheduler.on_report(name, report, now)).encode())
        digest.update(repr(scheduler.drain_events()).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    print(*(decisions(policy, 7) for policy in sys.argv[1:]), sep="\n")
