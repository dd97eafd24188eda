"""Options of the scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastserve.scheduler.core.types import Demotion, KvStrategy, PrefixCache


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Options of the scheduler. Raises ValueError when one is out of range."""

    policy: str = "fastserve"
    max_num_seqs: int | None = None  # cap below the worker's
    max_num_batched_tokens: int | None = None  # cap below the worker's
    max_queued_jobs: int = 1000  # waiting jobs, preempted ones too
    lease: int = 4  # iterations
    max_partial_prefills: int = 2  # rows of a plan whose prefill takes more than one iteration
    look_ahead: int = 64  # jobs that may be passed over in one plan because they do not fit
    levels: int = 10
    quantum_s: float | None = None  # of the first level; None: a decode iteration as measured
    quantum_ratio: float = 2.0
    demotion: Demotion = Demotion.AS_USED
    starvation_s: float = 3.0  # alpha: waiting time after which a job is promoted; inf: never
    promotion_share: float = 0.25  # of the rows, at the most, for promoted jobs
    kv_strategy: KvStrategy = KvStrategy.PROACTIVE
    kv_reserve_blocks: int | None = None  # kept idle; None: as newcomers and growth call for
    kv_write_through: bool = True  # proactive: copy full blocks out before their job has to leave
    prefix_cache: PrefixCache = PrefixCache.TENANT
    fair_sharing: bool = True  # between the tenants of a class, where the policy has it

    def __post_init__(self) -> None:
        at_least_one = (
            "max_queued_jobs", "lease", "max_partial_prefills", "look_ahead", "levels",
            "max_num_seqs", "max_num_batched_tokens",
        )  # fmt: skip
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name, kind in (
            ("kv_strategy", KvStrategy),
            ("demotion", Demotion),
            ("prefix_cache", PrefixCache),
        ):
            value = getattr(self, name)
            if value not in list(kind):
                known = ", ".join(kind)
                raise ValueError(f"{name} {value!r} is unknown: choose one of {known}")
            object.__setattr__(self, name, kind(value))  # a plain string will do
        if self.quantum_s is not None and not 0 < self.quantum_s < math.inf:
            raise ValueError(f"quantum_s must be greater than 0, not {self.quantum_s}")
        if self.kv_reserve_blocks is not None and self.kv_reserve_blocks < 0:
            raise ValueError(f"kv_reserve_blocks must be 0 or more, not {self.kv_reserve_blocks}")
        if not self.quantum_ratio > 1:
            raise ValueError(f"quantum_ratio must be greater than 1, not {self.quantum_ratio}")
        if not self.starvation_s > 0:
            raise ValueError(f"starvation_s must be greater than 0, not {self.starvation_s}")
        if not 0 < self.promotion_share <= 1:
            raise ValueError(f"promotion_share must be in (0, 1], not {self.promotion_share}")
