"""What goes into a simulation and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastserve.bench.sim.hardware import Hardware


class SimJob(NamedTuple):
    """One request: when it arrives (seconds), and its lengths in tokens."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = "default"
    service_class: str = "default"


@dataclass(frozen=True, slots=True)
class SimOptions:
    """One deployment: the scheduler's options, and the machine that it drives.

    kv_tokens: device KV memory in tokens, None for unlimited; host_kv_tokens likewise on the host,
    0 for none. pcie_gbps: 10^9 bytes per second in each direction.
    copy_ms: what a copy takes beside its bytes. speeds: of the worker groups,
    one each, against the hardware's formula. scheduler: further fields of `SchedulerConfig`.
    """

    policy: str
    hardware: Hardware
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    kv_tokens: int | None = None
    host_kv_tokens: int = 0
    pcie_gbps: float = 25.0
    copy_ms: float = 0.0
    kv_strategy: str = "proactive"
    block_size: int = 16
    lease: int = 4
    speeds: tuple[float, ...] = (1.0,)
    scheduler: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SimResult:
    """One entry per job, in the order given; float64 seconds, nan for a job that failed."""

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    first_token_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    service_s: NDArray[np.float64]  # that the scheduler charged in all
    served_s: NDArray[np.float64]  # of it, by the time the last job arrived
    tenants: list[str]
    preemptions: int
    offloaded_tokens: int
    uploaded_tokens: int
    recomputed_tokens: int
    kv_wait_s: float  # that the first in the order waited for KV on its way, over all jobs
    row_s: float  # of execution, likewise
    migrations: int  # of jobs to another group
    failed: int
    makespan_s: float  # first arrival to last end
