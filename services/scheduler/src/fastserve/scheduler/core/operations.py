"""KV operations under way at worker groups, what is left of jobs there, and KV between groups."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from fastserve.scheduler.core.types import KvOpKind, PreemptReason

if TYPE_CHECKING:
    from fastserve.scheduler.core.group import Group
    from fastserve.scheduler.core.job import Job


class Stage(Enum):
    """How far a migration is."""

    WANTED = auto()  # the EXPORT waits for its plan, and for other operations on the job
    SENDING = auto()
    SENT = auto()  # on the host there; the UPLOAD waits for its plan
    COMING = auto()  # being uploaded there
    THERE = auto()  # the job follows as soon as that group has time to compute what it lacks


@dataclass(slots=True, eq=False)
class Migration:
    """The KV of a job on its way to another group, while the job goes on where it is.

    host, device: blocks booked at `to`. tokens: that were sent. over: the job does not wait for it
    any more; what arrives nevertheless is released.
    """

    job: Job
    source: Group
    to: Group
    reason: PreemptReason
    host: int
    device: int = 0
    tokens: int = 0
    stage: Stage = Stage.WANTED
    over: bool = False


@dataclass(slots=True)
class Leftover:
    """What a job that is over still holds at the worker, in blocks."""

    device: int
    host: int
    busy: bool = False  # another operation has to end first


@dataclass(slots=True)
class Operation:
    """A KV operation under way. `job` None: it is elsewhere now, or this releases `leftover`, or
    uploads what comes with `migration`; an EXPORT has both a job and its migration."""

    kind: KvOpKind
    job: Job | None
    job_id: str
    leftover: Leftover | None = None
    began: float = 0.0  # the plan that holds it was made
    blocks: int = 0  # to be copied
    migration: Migration | None = None
