"""What the scheduler knows of one worker group: its jobs, its memory, the plans it was sent."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fastserve.scheduler.core.config import SchedulerConfig
from fastserve.scheduler.core.cost_model import CostModel
from fastserve.scheduler.core.fair_queue import FairQueue
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.operations import Leftover, Migration, Operation, Stage
from fastserve.scheduler.core.policies import Policy, policy_named
from fastserve.scheduler.core.prefixes import Prefixes
from fastserve.scheduler.core.transfers import Newcomers, Pace, Transfers
from fastserve.scheduler.core.types import (
    Inventory,
    JobState,
    KvOpKind,
    KvPlace,
    KvState,
    PlanRow,
    WorkerInfo,
)

_ON_DEVICE = frozenset({KvState.DEVICE, KvState.OFFLOADING, KvState.UPLOADING})
_FROM_HOST = frozenset({KvState.HOST, KvState.UPLOADING})


@dataclass(slots=True)
class SentPlan:
    """A plan that may still run, and for how many iterations."""

    plan_id: int
    lease_left: int
    rows: list[PlanRow]
    jobs: set[Job]  # of the rows
    held_up: int  # jobs that should have a row beside these, but wait for a copy


@dataclass(slots=True)
class Group:
    """State of one worker group. Blocks are booked before the worker can need them."""

    info: WorkerInfo
    config: SchedulerConfig
    next_place: Callable[[], int]
    cost: CostModel = field(init=False)
    policy: Policy = field(init=False)
    queue: FairQueue = field(init=False)
    prefixes: Prefixes = field(init=False)
    jobs: dict[str, Job] = field(default_factory=dict)  # those of the queue by id
    running: int = 0  # jobs with a row
    waiting: OrderedDict[Job, None] = field(default_factory=OrderedDict)
    #   those without a row that were not lifted for it, the longest waiting first
    left: tuple[int, int] = (0, 0)  # jobs without and with a row after the last plan
    resident: dict[Job, None] = field(default_factory=dict)  # KV state DEVICE
    device_used: int = 0
    host_used: int = 0
    plans: deque[SentPlan] = field(default_factory=deque)
    outstanding: int = 0  # iterations that may still run under them
    plan_id: int = 0
    iteration: int = 0
    op_id: int = 0
    ops: dict[int, Operation] = field(default_factory=dict)
    to_release: dict[str, Leftover] = field(default_factory=dict)
    to_drop: dict[Job, None] = field(default_factory=dict)  # lose what the device has of them
    place: KvPlace | None = None  # where it takes KV of other groups
    leaving: dict[Job, Migration] = field(default_factory=dict)  # whose KV goes to another group
    coming: dict[str, Migration] = field(default_factory=dict)  # KV of other groups, by job id
    unreachable: dict[str, float] = field(default_factory=dict)
    #   groups that could not be sent KV, and when that is tried again
    introduce: dict[str, int] = field(default_factory=dict)  # as in the next plan
    renew: dict[Job, None] = field(default_factory=dict)  # to be introduced with their next row
    host_reopens: float = 0.0  # when a host that refused blocks is tried again
    host_closed: bool = False
    outward: Transfers = field(default_factory=Transfers)
    inward: Transfers = field(default_factory=Transfers)
    exports: Transfers = field(default_factory=Transfers)
    pace: Pace = field(default_factory=Pace)
    newcomers: Newcomers = field(default_factory=Newcomers)
    draining: bool = False  # takes no new jobs, and gives away those that it has
    dismissed: bool = False  # it may leave
    restate: bool = False  # a plan is due, whatever goes on
    came: dict[Job, tuple[float, int]] = field(default_factory=dict)
    #   when jobs that ran elsewhere came here to go on, until a token comes: moment and iteration
    guests: dict[Job, None] = field(default_factory=dict)
    #   jobs that had a row elsewhere and came here to go on, until they lose it
    planned_at: float = 0.0  # the last plan was made then
    held_up: int = 0  # jobs that should have a row by it, but wait for a copy
    kv_wait_s: float = 0.0  # seconds of such waits, all jobs together
    row_s: float = 0.0  # seconds with a row, likewise

    def __post_init__(self) -> None:
        info, config = self.info, self.config
        self.cost = CostModel(info.prefill_sample, info.decode_sample)
        self.policy = policy_named(config.policy)(
            config,
            self.cost,
            rows=self.max_rows,
            budget=self.max_tokens,
            place=self.next_place,
        )
        blocks = info.device_blocks + info.host_blocks
        self.prefixes = Prefixes(config.prefix_cache, info.block_size, blocks)
        self.queue = FairQueue(
            self.policy.key,
            fair=config.fair_sharing and self.policy.fair,
            handicaps=self.policy.handicaps,
        )

    @property
    def max_rows(self) -> int:
        return min(self.info.max_num_seqs, self.config.max_num_seqs or self.info.max_num_seqs)

    @property
    def max_tokens(self) -> int:
        most = self.info.max_num_batched_tokens
        return min(most, self.config.max_num_batched_tokens or most)

    def blocks(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.info.block_size)

    def fits(self, total_tokens: int) -> bool:
        """Whether a job of so many tokens, output included, can ever run here."""
        return (
            total_tokens <= self.info.max_model_len
            and self.blocks(total_tokens) <= self.info.device_blocks
        )

    # --- jobs --------------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        """A waiting job that has its level and its place, and waits from now on."""
        job.worker_id = self.info.worker_id
        self.policy.admit(job)
        self.queue.add(job)
        self.jobs[job.job_id] = job
        self.waiting[job] = None

    def remove(self, job: Job, *, over: bool) -> None:
        """It is over, or goes elsewhere."""
        self.queue.remove(job)
        del self.jobs[job.job_id]
        self.policy.leave(job)
        if over:
            self.policy.ended(job)
            self.prefixes.note(job)
        job.row = None  # which holds the job
        self.running -= job.state is JobState.RUNNING
        self.waiting.pop(job, None)
        self.resident.pop(job, None)
        self.to_drop.pop(job, None)
        self.came.pop(job, None)
        self.guests.pop(job, None)

    def start(self, job: Job) -> None:
        """It has a row from now on."""
        job.state = JobState.RUNNING
        job.named = True
        self.running += 1
        self.waiting.pop(job, None)
        self.queue.start(job)

    def stop(self, job: Job, now: float) -> None:
        """It lost its row."""
        job.state = JobState.PREEMPTED
        job.preemptions += 1
        job.wait_since = now
        self.running -= 1
        self.waiting[job] = None
        self.guests.pop(job, None)
        self.queue.stop(job)

    # --- memory ------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Device blocks that nobody booked."""
        return self.info.device_blocks - self.device_used

    @property
    def host_free(self) -> int:
        return 0 if self.host_closed else self.info.host_blocks - self.host_used

    def set_kv(self, job: Job, kv: KvState) -> None:
        """Change where its KV is, and book accordingly."""
        job.kv = kv
        if kv is KvState.DEVICE:
            self.resident[job] = None
        else:
            self.resident.pop(job, None)
        self.book(job)

    def book(self, job: Job, iterations: int = 0) -> None:
        """Book what it may need under the plans that were sent and `iterations` more."""
        self.book_device(job, self.need(job, iterations) if job.kv in _ON_DEVICE else 0)

    def book_device(self, job: Job, blocks: int) -> None:
        self.device_used += blocks - job.booked
        job.booked = blocks

    def need(self, job: Job, iterations: int) -> int:
        """Device blocks it may need within so many iterations more, those it has included."""
        iterations += self.pending(job)
        tokens = job.prompt_len + len(job.output) + iterations
        if tokens > job.max_len:
            tokens = job.max_len
        if job.host_tokens > tokens and job.kv in _FROM_HOST:
            tokens = job.host_tokens
        return -(-tokens // self.info.block_size)

    def pending(self, job: Job) -> int:
        """Iterations it may still run under plans that were sent, at the most."""
        plans = self.plans
        if not plans or job.last_plan < plans[0].plan_id:
            return 0
        # Not a bound only: what is booked anew must never be more than what was.
        return sum(plan.lease_left for plan in plans if job in plan.jobs)

    def book_host(self, job: Job, blocks: int) -> None:
        self.host_used += blocks - job.host_booked
        job.host_booked = blocks

    def to_store(self, job: Job) -> int:
        """Blocks that are not on the host yet, or not as they are now."""
        return self.blocks(job.computed) - job.host_tokens // self.info.block_size

    def full_to_store(self, job: Job) -> int:
        """Of them, those that are full and will not change any more."""
        return job.computed // self.info.block_size - job.host_tokens // self.info.block_size

    def blocks_held(self, inventory: Inventory) -> int:
        """Device blocks of all jobs of an inventory."""
        return sum(self.blocks(tokens) for tokens in inventory.device_tokens.values())

    @property
    def busy(self) -> bool:
        """It has jobs, or something of former ones."""
        return bool(self.jobs or self.ops or self.to_release)

    # --- plans -------------------------------------------------------------------------------

    def catching_up(self) -> dict[Job, int]:
        """Jobs that ran elsewhere and are to go on here with the next iteration, and how many
        tokens more than for a decode that takes. Who got no row by the last plan waits as all
        others do."""
        return {
            job: job.known_len - max(job.computed, job.host_tokens) - 1
            for job, (since, _) in self.came.items()
            if job.state is JobState.RUNNING or since >= self.planned_at
        }

    def has_time(self, tokens: int) -> bool:
        """Whether the next iteration can compute so many of one more job that ran elsewhere, beside
        one for every other row and what those lack that came before."""
        lacking = sum(self.catching_up().values())
        rows, budget = self.size()
        return not lacking or min(rows, len(self.jobs) + 1) + lacking + tokens - 1 <= budget

    def size(self) -> tuple[int, int]:
        """Most rows and most tokens of the next iteration: what the policy says, and a row for each
        guest. More rows than are worth while make iterations longer, but a row that a job had
        elsewhere is not to be lost by the move."""
        rows, tokens = self.policy.size(len(self.waiting))
        more = min(len(self.guests), self.max_rows - rows)
        return rows + more, min(tokens + more, self.max_tokens)

    def clock(self, now: float) -> None:
        """A plan is made: count the time since the last one, if that let nobody run."""
        if not self.running:
            self.kv_wait_s += self.held_up * (now - self.planned_at)
        self.planned_at = now

    def operation(self, kind: KvOpKind, job: Job, now: float, blocks: int = 0) -> int:
        """Begin an operation on a job; returns its id. `blocks`: the most that a COPY_OUT copies,
        and that an EXPORT sends."""
        self.op_id += 1
        job.op, job.named = kind, True
        op = self.ops[self.op_id] = Operation(kind, job, job.job_id, began=now, blocks=blocks)
        if kind is KvOpKind.OFFLOAD:
            op.blocks = max(0, self.to_store(job))
        elif kind is KvOpKind.UPLOAD:
            op.blocks = self.blocks(job.host_tokens)
        channel = self.channel(kind)
        if channel is not None:
            channel.pending += op.blocks
        return self.op_id

    def channel(self, kind: KvOpKind) -> Transfers | None:
        """That of copies of this kind."""
        if kind in (KvOpKind.OFFLOAD, KvOpKind.COPY_OUT):
            return self.outward
        if kind is KvOpKind.EXPORT:
            return self.exports
        return self.inward if kind is KvOpKind.UPLOAD else None

    def take_in(self, migration: Migration, now: float) -> int:
        """Begin the upload of what another group sent; returns the id of the operation."""
        self.op_id += 1
        job_id, migration.stage = migration.job.job_id, Stage.COMING
        blocks = self.blocks(migration.tokens)
        self.ops[self.op_id] = Operation(
            KvOpKind.UPLOAD, None, job_id, began=now, blocks=blocks, migration=migration
        )
        self.inward.pending += blocks
        self.introduce[job_id] = migration.tokens
        return self.op_id

    def leave_behind(self, job_id: str, device: int, host: int, *, busy: bool = False) -> None:
        """So many blocks that are booked are of a job that is not here: to be released."""
        leftover = self.to_release.setdefault(job_id, Leftover(0, 0))
        leftover.device += device
        leftover.host += host
        leftover.busy |= busy

    def release(self, job_id: str, leftover: Leftover) -> int:
        """Begin the release of a job that is over; returns the id of the operation."""
        self.op_id += 1
        self.ops[self.op_id] = Operation(KvOpKind.RELEASE, None, job_id, leftover)
        if not leftover.busy:  # the worker frees the device at once
            self.device_used -= leftover.device
            leftover.device = 0
        return self.op_id

    def holds(self, job_id: str) -> bool:
        """Whether something of an ended job with this id is still to be released."""
        return job_id in self.to_release or self.releases(job_id)

    def releases(self, job_id: str) -> bool:
        """Whether it is being released."""
        return any(op.kind is KvOpKind.RELEASE and op.job_id == job_id for op in self.ops.values())

    def send(self, lease: int, rows: list[PlanRow], jobs: set[Job]) -> int:
        """Note a plan that goes out, with its jobs; returns its id. Its rows are booked already."""
        self.plan_id += 1
        self.plans.append(SentPlan(self.plan_id, lease, rows, jobs, self.held_up))
        self.outstanding += lease
        for job in jobs:
            job.last_plan = self.plan_id
        return self.plan_id

    def reached(self, plan_id: int, iterations: int, rows: int, seconds: float) -> None:
        """The worker has this plan in force and ran so many iterations (0 or 1) more of it, of so
        many rows, which took so long."""
        while self.plans and self.plans[0].plan_id < plan_id:
            self._unplan(self.plans.popleft())
        if iterations and self.plans and self.plans[0].plan_id == plan_id:
            plan = self.plans[0]
            self.kv_wait_s += plan.held_up * seconds
            self.row_s += rows * seconds
            if plan.lease_left:
                plan.lease_left -= 1
                self.outstanding -= 1

    def _unplan(self, plan: SentPlan) -> None:
        """It is over. Jobs of newer plans are booked anew with the next one."""
        self.outstanding -= plan.lease_left
        if self.plans and plan.jobs <= self.plans[0].jobs:
            return
        for job, _ in plan.rows:
            if job.last_plan == plan.plan_id and self.jobs.get(job.job_id) is job:
                self.book(job)
