"""The scheduler's core: pure, deterministic, standard library only.

`Scheduler` is the way in. Time is an argument, in seconds; nothing here does I/O.
"""

from fastserve.scheduler.core.config import SchedulerConfig
from fastserve.scheduler.core.cost_model import CostModel
from fastserve.scheduler.core.errors import (
    CoreError,
    IntegrityError,
    ProtocolError,
    UnknownPolicyError,
)
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.scheduler import Scheduler
from fastserve.scheduler.core.types import (
    CostSample,
    Demotion,
    Event,
    EventKind,
    Finished,
    FinishReason,
    Inventory,
    JobSpec,
    JobState,
    KvOperation,
    KvOpKind,
    KvPlace,
    KvState,
    KvStatus,
    KvStrategy,
    OpDone,
    Plan,
    PlanRow,
    PreemptMode,
    PreemptReason,
    PrefixCache,
    Progress,
    Rejection,
    RejectReason,
    Report,
    RowResult,
    SampledToken,
    WorkerInfo,
)

__all__ = [
    "CoreError",
    "CostModel",
    "CostSample",
    "Demotion",
    "Event",
    "EventKind",
    "FinishReason",
    "Finished",
    "IntegrityError",
    "Inventory",
    "Job",
    "JobSpec",
    "JobState",
    "KvOpKind",
    "KvOperation",
    "KvPlace",
    "KvState",
    "KvStatus",
    "KvStrategy",
    "OpDone",
    "Plan",
    "PlanRow",
    "PreemptMode",
    "PreemptReason",
    "PrefixCache",
    "Progress",
    "ProtocolError",
    "RejectReason",
    "Rejection",
    "Report",
    "RowResult",
    "SampledToken",
    "Scheduler",
    "SchedulerConfig",
    "UnknownPolicyError",
    "WorkerInfo",
]
