"""The words of the core: jobs, workers and reports go in, plans and progress come out.

Plain values, the same concepts as worker.proto and scheduler.proto without their encoding. Lengths
are counted in tokens, durations and moments in seconds, memory in KV blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fastserve.scheduler.core.job import Job


class JobState(StrEnum):
    """Where a job stands. The last three are final."""

    QUEUED = auto()  # has never had a row
    RUNNING = auto()  # has a row in the newest plan
    PREEMPTED = auto()  # had a row and will have one again
    FINISHED = auto()
    CANCELLED = auto()
    FAILED = auto()


class KvState(StrEnum):
    """Where the KV cache of a job is. A clean host copy may lie beside DEVICE."""

    NONE = auto()  # nothing computed yet
    DEVICE = auto()  # device blocks are booked: a row may be planned
    HOST = auto()  # committed blocks on the host, none on the device
    OFFLOADING = auto()
    UPLOADING = auto()
    DROPPED = auto()  # to be recomputed from the tokens


class FinishReason(StrEnum):
    """Why a job ended."""

    STOP = auto()
    LENGTH = auto()
    CANCELLED = auto()
    FAILED = auto()
    DEADLINE = auto()


class RejectReason(StrEnum):
    """Why a job was not taken; names as in scheduler.proto. The core uses the first six."""

    QUEUE_FULL = auto()
    NO_WORKER = auto()
    TOO_LONG = auto()
    INVALID = auto()
    ALREADY_EXISTS = auto()
    DEADLINE = auto()
    DRAINING = auto()
    NOT_FOUND = auto()


class KvOpKind(StrEnum):
    """KV operations of a plan; semantics in worker.proto."""

    OFFLOAD = auto()
    UPLOAD = auto()
    DROP_DEVICE = auto()
    DROP_HOST = auto()
    RELEASE = auto()
    COPY_OUT = auto()
    EXPORT = auto()


class KvStatus(StrEnum):
    """How a KV operation ended; semantics in worker.proto."""

    OK = auto()
    NO_HOST_SPACE = auto()
    NO_DEVICE_SPACE = auto()
    LOST = auto()
    NOT_SENT = auto()


class KvStrategy(StrEnum):
    """What becomes of KV caches when the device is full (FastServe paper, section 5)."""

    PROACTIVE = auto()  # leave before it is full, come back before they are needed
    REACTIVE = auto()  # leave when it is full, come back when they are needed
    RECOMPUTE = auto()  # are dropped
    DEFER = auto()  # stay; newcomers wait


class PrefixCache(StrEnum):
    """Whose jobs share the KV of equal beginnings."""

    OFF = auto()
    TENANT = auto()  # those of one tenant
    ALL = auto()

    def salt(self, spec: JobSpec) -> bytes:
        """What jobs that share have in common; empty: it shares with nobody."""
        if self is PrefixCache.TENANT:
            return b"tenant:" + spec.tenant.encode()
        return b"all" if self is PrefixCache.ALL else b""


class Demotion(StrEnum):
    """What a used-up quantum costs a job in the multi-level policies."""

    AS_USED = "as-used"  # as many levels as the use calls for; the rest counts where it lands
    ONE_LEVEL = "one-level"  # one level, however much it used (as the paper's artifact does)


class PreemptReason(StrEnum):
    """Why a running job lost its row."""

    QUANTUM = auto()  # it used its quantum up, and others were before it in the lower level
    PRIORITY = auto()  # strictly better work came
    MEMORY = auto()  # no device blocks for it
    WORKER_LOST = auto()
    DRAIN = auto()  # its worker group is to leave
    BALANCE = auto()  # it ends sooner in another group


class PreemptMode(StrEnum):
    """What became of the KV cache of a preempted job."""

    RESIDENT = auto()  # stays on the device
    SWAP = auto()  # goes on from the host copy
    RECOMPUTE = auto()


class EventKind(StrEnum):
    """What happened to a job."""

    QUEUED = auto()  # accepted (again after a restart)
    STARTED = auto()  # got a row: for the first time or after a preemption
    PREEMPTED = auto()  # lost its row
    OFFLOADED = auto()
    UPLOADED = auto()
    DEMOTED = auto()
    PROMOTED = auto()
    DROPPED = auto()  # KV given up, to be recomputed
    MIGRATED = auto()  # went to another worker group
    FINISHED = auto()  # for whatever reason


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What was submitted.

    `service_class` ("interactive", "default" or "batch") comes first in the order, or is a
    head start in `fastserve`; then the tenants of the class share service by `tenant_weight`; then
    `priority` (lower is sooner) orders the jobs of a tenant. `fcfs` and `hrrn` go by none of them.
    `min_tokens`: output tokens that it has whatever is sampled, which decides whether its deadline
    can be met. Raises ValueError for a weight that is not greater than 0.
    """

    job_id: str
    prompt: Sequence[int]  # token ids
    max_tokens: int
    arrival: float
    tenant: str = "default"
    tenant_weight: float = 1.0
    service_class: str = "default"
    priority: int = 0
    deadline: float | None = None
    min_tokens: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.tenant_weight < math.inf:
            raise ValueError(f"tenant_weight must be greater than 0, not {self.tenant_weight}")


class CostSample(NamedTuple):
    """One measured iteration. `context_tokens` is the sum over rows of tokens attended to."""

    rows: int
    new_tokens: int
    context_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker group. Raises ValueError when a limit or a sample makes no sense."""

    worker_id: str
    block_size: int  # tokens per block
    device_blocks: int
    host_blocks: int  # 0: no host memory
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    prefill_sample: CostSample
    decode_sample: CostSample

    def __post_init__(self) -> None:
        for name in ("block_size", "device_blocks", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"worker {self.worker_id}: {name} must be at least 1")
        if self.max_model_len < 2 or self.host_blocks < 0:
            raise ValueError(f"worker {self.worker_id}: bad max_model_len or host_blocks")
        for name in ("prefill_sample", "decode_sample"):
            sample: CostSample = getattr(self, name)
            usable = math.isfinite(sample.seconds) and sample.seconds > 0
            if not usable or sample.rows < 1 or sample.new_tokens < 1:
                raise ValueError(f"worker {self.worker_id}: {name} is not a measurement: {sample}")


class KvPlace(NamedTuple):
    """Where other groups can send KV to; semantics in worker.proto."""

    worker_id: str
    layout: str
    peers: tuple[str, ...]  # one address per rank


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a worker holds when its stream opens, in tokens by job id, and where it takes KV."""

    device_tokens: Mapping[str, int] = field(default_factory=dict)
    host_tokens: Mapping[str, int] = field(default_factory=dict)
    place: KvPlace | None = None


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a job was not taken. `retry_after_s` 0: no hint."""

    reason: RejectReason
    message: str
    retry_after_s: int = 0


class RowResult(NamedTuple):
    """A row that ran: tokens processed, and tokens in device KV afterwards."""

    job_id: str
    new_tokens: int
    computed: int


class SampledToken(NamedTuple):
    """A token sampled for output position `index`; `finish` if the job ended with it."""

    job_id: str
    index: int  # type: ignore[assignment]  # hides a method that nobody needs
    token: int
    finish: FinishReason | None = None


class OpDone(NamedTuple):
    """A KV operation that ended.

    `tokens`: OFFLOAD, COPY_OUT: now on the host; UPLOAD: on the device; EXPORT: on the host,
    whatever the status.
    """

    op_id: int
    status: KvStatus
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker says after an iteration, or (iteration 0) when only KV operations ended.

    Rows and sampled tokens may be plain tuples, which are made several times faster.
    """

    plan_id: int  # the plan in force
    iteration: int  # counts up on the stream, from 1
    rows: Sequence[tuple[str, int, int]] = ()  # as `RowResult`
    sampled: Sequence[tuple[str, int, int, FinishReason | None]] = ()  # as `SampledToken`
    cached: Sequence[tuple[str, int]] = ()  # job that begins, tokens of it found in the cache
    ops: Sequence[OpDone] = ()
    stalled: Sequence[str] = ()
    failed: Sequence[tuple[str, str]] = ()  # job id, message
    free_device_blocks: int = 0
    free_host_blocks: int = 0
    seconds: float = 0.0
    context_tokens: int = 0


class Finished(NamedTuple):
    """A job that ended. `error` is meant for the client."""

    job_id: str
    reason: FinishReason
    error: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a report brought: tokens first, in order, then the jobs that ended.

    A new output token comes with its job, its index there, and its place in `Report.sampled`; plain
    tuples, since there is one per row and iteration.
    """

    tokens: list[tuple[str, int, int, int]]  # job id, index, token, position
    finished: list[Finished]


class PlanRow(NamedTuple):
    """`tokens`: the most that the row processes in one iteration."""

    job: Job
    tokens: int


class KvOperation(NamedTuple):
    """A KV operation; `job_id` need not be known (a RELEASE of something left over).

    `blocks`: the most that a COPY_OUT or EXPORT copies. `to`: where an EXPORT sends to.
    """

    op_id: int
    kind: KvOpKind
    job_id: str
    blocks: int = 0
    to: KvPlace | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker is to do until it hears again; semantics in worker.proto.

    `introduce`: jobs that are to be sent whole, even if the worker knows them, with the tokens of
    each that another group sent to its host.
    """

    plan_id: int
    lease: int
    rows: list[PlanRow]
    ops: list[KvOperation]
    may_leave: bool = False  # the group is draining, and nothing of it is needed any more
    introduce: Mapping[str, int] = field(default_factory=dict)


class Event(NamedTuple):
    """Something that happened to a job, for traces, metrics and the store."""

    job_id: str
    kind: EventKind
    level: int
    now: float
