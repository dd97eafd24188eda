"""Whether the books agree: for tests, it looks at every job."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fastserve.scheduler.core.errors import IntegrityError
from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.operations import Leftover, Migration
from fastserve.scheduler.core.types import JobState, KvOpKind, KvState


def check(groups: Iterable[Group], live: Collection[Job], homeless: Iterable[Job]) -> None:
    """Raises `IntegrityError`."""
    groups = list(groups)
    for group in groups:
        _check_group(group)
        _check_migrations(group, groups)
    placed = [job for group in groups for job in group.queue]
    placed.extend(homeless)
    _demand(len(placed) == len(set(placed)), "a job stands in two queues")
    _demand(set(placed) == set(live), "a live job stands in no queue")


def _check_group(group: Group) -> None:
    jobs = list(group.queue)
    group.queue.check()
    ended = [*group.to_release.values()]
    ended += [op.leftover for op in group.ops.values() if op.leftover is not None]
    held: list[Leftover | Migration] = [*ended, *group.coming.values()]
    device = sum(job.booked for job in jobs) + sum(other.device for other in held)
    host = sum(job.host_booked for job in jobs) + sum(other.host for other in held)
    _demand(device == group.device_used, f"{group.device_used} blocks booked, not {device}")
    _demand(host == group.host_used, f"{group.host_used} host blocks booked, not {host}")
    _demand(group.device_used <= group.info.device_blocks, "more blocks booked than there are")
    running = [job for job in jobs if job.state is JobState.RUNNING]
    _demand(len(running) == group.running, f"{group.running} rows, not {len(running)}")
    for job in jobs:
        planned = sum(
            plan.lease_left for plan in group.plans for row in plan.rows if row.job is job
        )
        pending = group.pending(job)
        # One that came back at once: its rows are of before, and end with its release.
        again = job.op is KvOpKind.RELEASE
        _demand(again or pending >= planned, f"{job}: pending {pending}, but {planned} planned")
        _demand((job in group.resident) == (job.kv is KvState.DEVICE), f"{job}: residence")
        _demand(group.jobs.get(job.job_id) is job, f"{job} is not known by its id")
    _demand(len(group.jobs) == len(jobs), f"{len(group.jobs)} jobs by id, not {len(jobs)}")


def _check_migrations(group: Group, groups: list[Group]) -> None:
    for job, migration in group.leaving.items():
        _demand(job.migration is migration and not migration.over, f"{job}: a migration too many")
        _demand(group.jobs.get(job.job_id) is job, f"{job} leaves where it is not")
        _demand(migration.to in groups, f"{job} goes to nowhere")
        _demand(migration.to.coming.get(job.job_id) is migration, f"{job} is not expected")
    for job in group.queue:
        _demand(job.migration is None or job in group.leaving, f"{job}: a migration of nobody")
    for migration in group.coming.values():
        _demand(migration.to is group, f"{migration.job} goes elsewhere")
        _demand(migration.source in groups, f"{migration.job} comes from nowhere")
        if migration.over:
            sending = any(op.migration is migration for op in migration.source.ops.values())
            _demand(sending, f"{migration.job}: nothing of it will come")


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message)
