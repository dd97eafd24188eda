"""A job as the scheduler sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastserve.scheduler.core.types import JobSpec, JobState, KvOpKind, KvState, PlanRow

if TYPE_CHECKING:
    from fastserve.scheduler.core.fair_queue import Lane
    from fastserve.scheduler.core.operations import Migration


class Job:
    """One job, live or just ended. Others read it; only the core writes.

    Invariant: `computed` <= `known_len` - 1 as far as reports tell, since the last known token is
    always processed to sample the next one.
    """

    __slots__ = (
        "attained",
        "booked",
        "boosted",
        "cached",
        "computed",
        "dropped_at",
        "drops",
        "handicap",
        "held_from",
        "host_booked",
        "host_tokens",
        "key",
        "kv",
        "lane",
        "last_plan",
        "level",
        "limit",
        "max_len",
        "migration",
        "moved_len",
        "named",
        "newcomer",
        "op",
        "output",
        "peak",
        "place",
        "preemptions",
        "prompt_len",
        "row",
        "seq",
        "spec",
        "state",
        "sunk",
        "used",
        "wait_since",
        "worker_id",
    )  # fmt: skip

    def __init__(self, spec: JobSpec, seq: int, now: float) -> None:
        self.spec = spec
        self.seq = seq  # order of submission
        self.prompt_len = len(spec.prompt)
        self.max_len = self.prompt_len + spec.max_tokens  # known_len never exceeds it
        self.output: list[int] = []
        self.state = JobState.QUEUED
        self.worker_id: str | None = None  # the worker group it belongs to

        self.lane: Lane  # of its tenant in its group; set while it has one

        self.migration: Migration | None = None  # of its KV to another group, under way
        self.moved_len = 0  # known_len when it last went to another group

        # Policy.
        self.key: tuple[float, ...] = ()  # where it stands in its queue
        self.handicap: tuple[int, ...] = ()  # which of them that is, if its queue has handicaps
        self.level = 0
        self.newcomer = False  # has not used its first quantum up, if the policy asks for that
        self.attained = 0.0  # seconds of service it was charged for
        self.limit = 0.0  # what the policy noted of it when it came to its group
        self.used = 0.0  # seconds of the quantum of its level
        self.place = seq  # order within its level
        self.boosted = False  # promoted out of starvation, before level 0
        self.sunk = False  # moved down since it last had to fight for its row
        self.preemptions = 0
        self.wait_since = now  # when it last stopped running, or was submitted

        # KV cache.
        self.kv = KvState.NONE
        self.computed = 0  # tokens in device KV, as last reported
        self.cached = 0  # tokens of the prompt that were in the prefix cache when it first began
        self.host_tokens = 0  # committed tokens on the host
        self.held_from = 0.0  # `attained` when its KV last came to the device
        self.drops = 0  # times it lost its KV cache to make room
        self.dropped_at = 0  # tokens that were computed when it last lost some
        self.peak = 0  # most tokens that were ever computed
        self.op: KvOpKind | None = None  # the KV operation under way: one at a time
        self.last_plan = 0  # the newest plan of its group that has a row for it
        self.row: PlanRow | None = None  # that of a decode: the same in plan after plan
        self.booked = 0  # device blocks that nobody else may have
        self.host_booked = 0  # likewise on the host
        self.named = False  # the worker knows it: it must hear of its end

    @property
    def job_id(self) -> str:
        return self.spec.job_id

    @property
    def known_len(self) -> int:
        """Prompt and output tokens so far."""
        return self.prompt_len + len(self.output)

    @property
    def remaining(self) -> int:
        """Known tokens that are not in device KV: 1 when it decodes."""
        return self.prompt_len + len(self.output) - self.computed

    @property
    def live(self) -> bool:
        """Not ended."""
        return self.state in _LIVE

    def decode_row(self) -> PlanRow:
        """Makes `row`."""
        self.row = PlanRow(self, 1)
        return self.row

    def bound(self, iterations: int) -> int:
        """Most tokens it can have in device KV after so many iterations more."""
        tokens = self.prompt_len + len(self.output) + iterations
        return tokens if tokens < self.max_len else self.max_len

    def __repr__(self) -> str:
        return (
            f"Job({self.spec.job_id}, {self.state}, kv={self.kv}, level={self.level}, "
            f"computed={self.computed}/{self.known_len})"
        )


_LIVE = frozenset({JobState.QUEUED, JobState.RUNNING, JobState.PREEMPTED})
