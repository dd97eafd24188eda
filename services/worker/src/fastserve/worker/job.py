"""A job as the worker sees it: tokens, KV on the device, and how much of it the host has."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto

from fastserve.worker.model.sampling import SamplingParams
from fastserve.worker.staging.types import Place


class OpKind(Enum):
    """KV operations, as in worker.proto."""

    OFFLOAD = auto()
    UPLOAD = auto()
    DROP_DEVICE = auto()
    DROP_HOST = auto()
    RELEASE = auto()
    COPY_OUT = auto()
    EXPORT = auto()


class OpStatus(Enum):
    """How a KV operation ended, as in worker.proto."""

    OK = auto()
    NO_HOST_SPACE = auto()
    NO_DEVICE_SPACE = auto()
    LOST = auto()
    NOT_SENT = auto()


_BESIDE_ROWS = (OpKind.COPY_OUT, OpKind.EXPORT)


@dataclass(frozen=True, slots=True)
class Op:
    """A KV operation the scheduler asked for; `blocks`: the most that COPY_OUT and EXPORT copy;
    `to`: where an EXPORT sends to."""

    op_id: int
    kind: OpKind
    handle: int
    blocks: int = 0
    to: Place | None = None


@dataclass(frozen=True, slots=True)
class OpResult:
    """A KV operation that ended; `tokens` on the host (OFFLOAD, COPY_OUT, EXPORT) or device
    (UPLOAD)."""

    op_id: int
    status: OpStatus
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Job:
    """State of one job.

    tokens: prompt, then output. computed: how many of them have KV in `blocks`, in order.
    host_tokens: how many have committed KV on the host. ops: KV operations not ended yet, oldest
    first; the first is under way if `copying`, and until it ends no block of the job is freed.
    salt: jobs with the same one share blocks; with b"" it shares none. keys: of its first blocks,
    as far as they were made. registered: how many of its first blocks were offered to others.
    certain: tokens up to which its KV is surely that of its tokens. fetching: its beginning comes
    from the cache on the host, and no row can run until it is there. found: tokens that the cache
    had on the device and on the host when it began, until that was told.
    """

    job_id: str
    handle: int
    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    traceparent: str = ""
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    host_tokens: int = 0
    host_generation: int = 0  # life of the sidecar that has them
    finished: bool = False
    copying: bool = False
    salt: bytes = b""
    keys: list[bytes] = field(default_factory=list)
    registered: int = 0
    certain: float = math.inf
    fetching: bool = False
    found: tuple[int, int] | None = None
    ops: deque[Op] = field(default_factory=deque)

    @property
    def moving(self) -> bool:
        """Its KV is on its way or about to be: no row may use it. Full blocks may be copied beside
        a row, which writes other blocks only."""
        return any(op.kind not in _BESIDE_ROWS for op in self.ops)

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.prompt_len :]
