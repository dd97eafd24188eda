"""What the service knows about a job beside the core: where its tokens go and how far they got.

Three cursors count the output of a job, each at most the one before it:
    len(output)   sampled by a worker and accepted by the core
    visible       in Redis (or durability is declared lost): may leave the process
    sent          written to the gateway that holds the job now
A gateway that is slow or gone only lets `sent` fall behind, so nothing piles up per gateway, and a
token leaves exactly once per attachment whatever the order of events. `sent` starts beyond the
others when a gateway has seen tokens that a former leader lost: they are sampled again and skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from fastserve.proto.v1.sampling_pb2 import SamplingParams
from fastserve.scheduler.core import FinishReason, Job, JobSpec


class Recipient(Protocol):
    """A gateway stream, as the job table sees it."""

    def wake(self, record: JobRecord) -> None:
        """Something of `record` became visible."""

    def drop(self, record: JobRecord) -> None:
        """It is sent elsewhere from now on."""


class TokenLogprobs(NamedTuple):
    """Log-probability of a sampled token, and the likeliest ones, likeliest first."""

    chosen: float
    top_ids: Sequence[int]
    top: Sequence[float]


class End(NamedTuple):
    """How a job ended; `error` is meant for the client."""

    reason: FinishReason
    error: str


@dataclass(slots=True, eq=False)
class JobRecord:
    """One job of the service. `job` and `output` belong to the core and are only read here."""

    spec: JobSpec
    output: Sequence[int]
    job: Job | None  # None: it ended under a former leader
    sampling: SamplingParams
    traceparent: str
    arrival_unix_s: float
    deadline_unix_s: float
    end: End | None = None
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by output index

    preempted_at: float | None = None  # core time; None: not preempted now
    preempted_s: float = 0.0  # in all, up to now

    written: int = -1  # tokens in Redis or on the way; -1: not even the job
    visible: int = -1  # -1: the submission itself is not durable yet
    end_visible: bool = False

    recipient: Recipient | None = None
    handle: int = 0
    sent: int = 0
    accepted_sent: bool = False

    @property
    def job_id(self) -> str:
        return self.spec.job_id

    def attach(self, recipient: Recipient, handle: int, next_index: int) -> None:
        """Send what becomes visible from `next_index` on to `recipient`."""
        self.recipient, self.handle, self.sent = recipient, handle, next_index
        self.accepted_sent = False


class JobTable:
    """All jobs: live ones, and ended ones for a while so that a late Attach gets their tail.

    A job without a gateway stream is an orphan and is cancelled once its grace is over.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._records: dict[str, JobRecord] = {}
        self._orphans: dict[str, float] = {}  # job id -> end of grace, oldest first
        self._ended: dict[str, float] = {}  # job id -> when it is forgotten, oldest first

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[JobRecord]:
        return iter(self._records.values())

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._records

    def get(self, job_id: str) -> JobRecord | None:
        return self._records.get(job_id)

    def live(self) -> Iterator[JobRecord]:
        return (record for record in self._records.values() if record.end is None)

    def add(self, record: JobRecord) -> None:
        self._records[record.job_id] = record

    def orphan(self, record: JobRecord, now: float) -> None:
        """Its gateway stream is gone."""
        record.recipient = None
        if record.end is None:
            self._orphans.pop(record.job_id, None)
            self._orphans[record.job_id] = now + self._grace_s

    def adopt(self, record: JobRecord) -> None:
        """A gateway stream holds it (again)."""
        self._orphans.pop(record.job_id, None)

    def retire(self, record: JobRecord, now: float) -> None:
        """It ended: keep it for the grace, no longer."""
        self._orphans.pop(record.job_id, None)
        self._ended[record.job_id] = now + self._grace_s

    def abandoned(self, now: float) -> list[JobRecord]:
        """Orphans whose grace is over; each is handed out once."""
        return [self._records[job_id] for job_id in _due(self._orphans, now)]

    def forget_ended(self, now: float) -> None:
        """Drop ended jobs whose time is over; Redis expires them by itself."""
        for job_id in _due(self._ended, now):
            del self._records[job_id]


def _due(times: dict[str, float], now: float) -> list[str]:
    """Remove and return the keys whose time has come; `times` is in order of time."""
    due = []
    for key, when in times.items():
        if when > now:
            break
        due.append(key)
    for key in due:
        del times[key]
    return due
