"""How much work waits: what an autoscaler needs to know, in the seconds that users wait."""

from __future__ import annotations

from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.types import JobState


def queued_work_s(group: Group) -> float:
    """Predicted seconds until the group is through with the jobs that have no row now.

    Prefills run one after the other, decodes side by side, as many as the group has rows. Nobody
    knows how long an answer gets: a job is expected to take what those that ended took on average.
    """
    prefill_s = decode_s = 0.0
    for job in group.jobs.values():
        if job.state is not JobState.RUNNING:
            prefill_s += _prefill_s(group, job)
            decode_s += _decode_s(group, job)
    return prefill_s + decode_s / group.max_rows


def _prefill_s(group: Group, job: Job) -> float:
    """What the tokens without KV make iterations longer by."""
    start = max(job.computed, job.host_tokens)
    missing = job.known_len - start
    return group.cost.more(start, missing) if missing > 1 else 0.0


def _decode_s(group: Group, job: Job) -> float:
    step_s = group.cost.decode_s
    expected = max(group.policy.mean_service_s - job.attained, step_s)
    return min(expected, (job.max_len - job.known_len) * step_s)
