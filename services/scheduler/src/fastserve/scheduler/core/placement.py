"""Where a job runs: the worker group at which it would end first, by estimate.

A job ends at a group after it waited for a row, its known tokens were computed, and its output was
decoded. Who waits for whom goes by the policy's order, at the level to which the job will have sunk
by the time it needs what jobs usually need; rows are as many as the group runs at once and its
memory holds. All times come from the group's own cost model, so a slow group gets less.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Final

from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.migrations import sendable
from fastserve.scheduler.core.policies.base import Key

# Jobs of a group that are looked at; the others are taken to be like them.
_SAMPLE: Final = 32
# Output tokens of a job before any was seen to end, and the least share of the newest in the mean.
_FIRST_GUESS: Final = 256
_NEWEST: Final = 0.01
# Share of the mean output that a job is expected to have still when it had that much already.
_BEYOND: Final = 0.25


@dataclass(slots=True)
class Lengths:
    """What outputs of jobs use to be long, over all groups."""

    mean: float = _FIRST_GUESS
    _seen: int = 0

    def note(self, tokens: int) -> None:
        """A job ended by itself, with so many."""
        self._seen += 1
        self.mean += max(_NEWEST, 1 / (self._seen + 1)) * (tokens - self.mean)

    def left(self, job: Job) -> float:
        """Output tokens that it is expected to have still."""
        output, spec = len(job.output), job.spec
        total = max(self.mean, spec.min_tokens)
        left = max(total - output, self.mean * _BEYOND, 1.0)
        return min(left, spec.max_tokens - output)


def tokens_to_compute(group: Group, job: Job) -> int:
    """Known tokens of the job whose KV the group does not have: at least the last one.

    The one place where placement asks what a group has of a job.
    """
    held = max(job.computed, job.host_tokens) if job.worker_id == group.info.worker_id else 0
    return max(job.known_len - (held or group.prefixes.held(job)), 1)


def can_send(source: Group, job: Job, to: Group, now: float) -> bool:
    """Whether there is KV of the job to send, and the other group can take it."""
    here, there = source.place, to.place
    if here is None or there is None or here.layout != there.layout:
        return False
    tokens, host_free = sendable(source, job), to.info.host_blocks - to.host_used
    return (
        0 < len(here.peers) == len(there.peers)
        and 0 < source.blocks(tokens) <= host_free
        and now >= source.unreachable.get(there.worker_id, 0.0)
        and job.job_id not in to.coming
        and not to.holds(job.job_id)
    )


def send_s(source: Group, to: Group, tokens: int) -> float:
    """Seconds until so many tokens of KV are at the other group, as measured; 0 at first."""
    blocks = source.blocks(tokens)
    return source.exports.seconds(blocks) + to.inward.seconds(blocks)


def completion_s(
    group: Group, job: Job, lengths: Lengths, source: Group | None, now: float
) -> float:
    """Seconds until the job would end at this group if nobody else came. `source`: where it is."""
    others = [other for other in _sample(group) if other is not job]
    scale = len(group.jobs) / max(len(others), 1)
    stand = _standing(group, job, lengths)
    ahead = output = prompt = blocks = 0.0
    for other in others:
        left = lengths.left(other)
        blocks += group.blocks(int(other.known_len + left))
        if group.queue.position(other) < stand:
            ahead += scale
            output += scale * left
            held = max(other.computed, other.host_tokens)
            prompt += scale * max(0, other.known_len - held - 1)
    rows = group.size()[0]
    left = lengths.left(job)
    own = group.blocks(int(job.known_len + left))
    rows_held = int(group.info.device_blocks * (len(others) + 1) / (blocks + own))
    rows = max(1, min(rows, rows_held))
    iterations = left
    if ahead >= rows:
        # Rows become free as those ahead end; with no more of them than rows, after a part of one.
        iterations += output / rows * (ahead - rows + 1) / ahead
    decode_s = group.cost.decode(min(rows, len(group.jobs) + 1))
    rate = group.cost.prefill_tokens_per_s
    token_s = 1 / rate if rate else 0.0
    own_s = tokens_to_compute(group, job) * token_s
    if source is not None and source is not group and can_send(source, job, group, now):
        held = sendable(source, job)
        own_s = min(own_s, send_s(source, group, held) + (job.known_len - held) * token_s)
    return iterations * decode_s + prompt * token_s + own_s


def _sample(group: Group) -> list[Job]:
    """Jobs of the group, evenly spread over the order in which they came."""
    step = max(1, len(group.jobs) // _SAMPLE)
    return list(islice(group.jobs.values(), 0, None, step))


def _standing(group: Group, job: Job, lengths: Lengths) -> Key:
    """Where it stands in the group's order by the time it has had what jobs need."""
    policy = group.policy
    probe = Job(job.spec, job.seq, job.wait_since)
    probe.output, probe.place = job.output, job.place
    policy.admit(probe)
    quanta = policy.quanta()
    if len(quanta) > 1:
        probe.level, probe.newcomer = job.level, False
        need = job.used + lengths.left(job) * group.cost.decode_s
        while probe.level < len(quanta) - 1 and need >= quanta[probe.level]:
            need -= quanta[probe.level]
            probe.level += 1
    return policy.key(probe)
