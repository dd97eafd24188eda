"""What `fastserve top` shows, from snapshots of the schedulers: pure, time is an argument."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastserve.proto.v1.scheduler_pb2 import JobState, SnapshotResponse, WorkerState

_BAR = 24
_MOVES = 8  # lines
_MOVE_S = 30.0  # how long one is shown
_LIVE = ("running", "queued", "preempted")


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment."""

    at: float  # seconds, monotonic
    shards: Sequence[SnapshotResponse]
    # Slots and bytes of the kv-offload sidecars, if their metrics can be read; tiers are host, disk
    # and peer.
    tiers: Mapping[str, Tier] = field(default_factory=dict)
    missing: Sequence[str] = ()  # what could not be asked, a line each


@dataclass(frozen=True)
class Tier:
    """A place for KV blocks off the device."""

    used: int = 0  # slots
    slots: int = 0
    bytes_out: float = 0.0  # moved to it, since its process started
    bytes_in: float = 0.0  # moved from it


@dataclass(frozen=True)
class Move:
    """A job that changed its level."""

    at: float
    job_id: str
    before: int
    after: int


class View:
    """Compares each sample with the one before, for rates and for jobs that moved."""

    def __init__(self, most_jobs: int = 12) -> None:
        self._most_jobs = most_jobs
        self._now: Sample | None = None
        self._before: Sample | None = None
        self._levels: dict[tuple[str, str], int] = {}  # by shard and job
        self._moves: deque[Move] = deque(maxlen=_MOVES)
        self._moved: Counter[tuple[str, int, int]] = Counter()  # shard, level, +1 came / -1 left

    @property
    def moves(self) -> Sequence[Move]:
        """The newest first."""
        return list(self._moves)

    def update(self, sample: Sample) -> None:
        self._before, self._now = self._now, sample
        levels = {
            (shard.shard, job.job_id): job.level for shard in sample.shards for job in shard.jobs
        }
        self._moved.clear()
        for key, level in levels.items():
            before = self._levels.get(key, level)
            if before != level:
                self._moves.appendleft(Move(sample.at, key[1], before, level))
                self._moved[key[0], before, -1] += 1
                self._moved[key[0], level, 1] += 1
        self._levels = levels
        while self._moves and sample.at - self._moves[-1].at > _MOVE_S:
            self._moves.pop()

    def render(self) -> RenderableType:
        """The whole screen. There must have been a sample."""
        assert self._now is not None
        parts: list[RenderableType] = [Text(line, "red") for line in self._now.missing]
        for shard in self._now.shards:
            parts += [_headline(shard), self._queues(shard)]
        if self._now.shards:
            parts += [self._workers(), self._memory(), self._jobs()]
            if self._moves:
                parts.append(self._movements(self._now.at))
        return Group(*parts)

    def _queues(self, shard: SnapshotResponse) -> Table:
        table = _table("level", "quantum", "running", "waiting", "", "moved")
        running = Counter(job.level for job in shard.jobs if job.state == "running")
        longest = max([*shard.level_depths, 1])
        for level, (depth, quantum) in enumerate(
            zip(shard.level_depths, shard.level_quanta_s, strict=True)
        ):
            came = self._moved[shard.shard, level, 1]
            left = self._moved[shard.shard, level, -1]
            moved = " ".join([*([f"+{came}"] if came else []), *([f"-{left}"] if left else [])])
            table.add_row(
                *[str(level), _seconds(quantum), str(running[level] or ""), str(depth or "")],
                *[Text("█" * round(_BAR * depth / longest), "cyan"), Text(moved, "yellow")],
            )
        return table

    def _workers(self) -> Table:
        # tokens/s: sampled; all/s: those of prompts, too.
        table = _table("worker", "model", "rows", "iteration", "tokens/s", "all/s", "cost error")
        before = {worker.address: worker for worker in self._all_workers(self._before)}
        for worker in self._all_workers(self._now):
            if not worker.connected:
                table.add_row(worker.address, Text("not connected", "red"))
                continue
            past = before.get(worker.address)
            table.add_row(
                *[worker.worker_id, worker.model, _rows(worker)],
                _seconds(worker.iteration_s) if worker.iterations else "",
                self._rate(past.sampled_tokens if past else None, worker.sampled_tokens),
                self._rate(past.processed_tokens if past else None, worker.processed_tokens),
                f"{worker.cost_model_error:.0%}",
            )
        return table

    def _memory(self) -> Table:
        table = _table("KV", "used", "of", "", "out", "in")
        for worker in self._all_workers(self._now):
            if worker.connected:
                used = worker.device_blocks - worker.free_device_blocks
                name = f"device {worker.worker_id}"
                table.add_row(name, *_filled(used, worker.device_blocks), "", "")
                if not self._now_tiers():
                    used = worker.host_blocks - worker.free_host_blocks
                    name = f"host {worker.worker_id}"
                    table.add_row(name, *_filled(used, worker.host_blocks), "", "")
        before = self._before.tiers if self._before is not None else {}
        for name, tier in self._now_tiers().items():
            past = before.get(name)
            table.add_row(
                name,
                *_filled(tier.used, tier.slots),
                self._rate(past.bytes_out if past else None, tier.bytes_out, "MB/s", 1e6),
                self._rate(past.bytes_in if past else None, tier.bytes_in, "MB/s", 1e6),
            )
        return table

    def _jobs(self) -> Table:
        table = _table(
            *["job", "tenant", "state", "KV", "level", "prompt", "output", "preempted", "age"]
        )
        jobs = sorted(self._all_jobs(), key=lambda job: (_order(job), job.level, -job.age_s))
        for job in jobs[: self._most_jobs]:
            style = {"running": "green", "preempted": "yellow"}.get(job.state, "")
            table.add_row(
                *[_short(job.job_id), job.tenant],
                Text(job.state, style),
                *[job.kv, str(job.level), str(job.prompt_tokens)],
                *[str(job.output_tokens), str(job.preemptions or "")],
                f"{job.age_s:.1f} s",
            )
        if len(jobs) > self._most_jobs:
            table.add_row(f"and {len(jobs) - self._most_jobs} more")
        return table

    def _movements(self, now: float) -> Text:
        lines = [
            f"{_short(move.job_id)} level {move.before} → {move.after}, {now - move.at:.0f} s ago"
            for move in self._moves
        ]
        return Text("\n".join(lines), "dim")

    def _rate(self, before: float | None, now: float, unit: str = "", scale: float = 1.0) -> str:
        """Change per second; nothing while there is no sample before, or the counter restarted."""
        if before is None or self._before is None or self._now is None or now < before:
            return ""
        seconds = self._now.at - self._before.at
        return f"{(now - before) / scale / seconds:.1f} {unit}".strip() if seconds > 0 else ""

    def _now_tiers(self) -> Mapping[str, Tier]:
        return self._now.tiers if self._now is not None else {}

    def _all_jobs(self) -> Iterable[JobState]:
        assert self._now is not None
        return [job for shard in self._now.shards for job in shard.jobs]

    @staticmethod
    def _all_workers(sample: Sample | None) -> Iterable[WorkerState]:
        return [worker for shard in sample.shards for worker in shard.workers] if sample else []


def _headline(shard: SnapshotResponse) -> Text:
    running = sum(job.state == "running" for job in shard.jobs)
    preempted = sum(job.state == "preempted" for job in shard.jobs)
    preemptions = sum(
        count for name, count in shard.counters.items() if name.startswith("preemptions.")
    )
    text = Text.assemble(
        (f"shard {shard.shard}", "bold"),
        f"  {shard.policy}  up {shard.uptime_s:.0f} s  {running} running, "
        f"{sum(shard.level_depths)} waiting ({preempted} preempted)  {preemptions} preemptions",
    )
    if not shard.durable:
        text.append("  NOT durable: Redis is away", "bold red")
    return text


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    words = {"worker", "model", "KV", "job", "tenant", "state", "", "moved"}
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right", no_wrap=True)
    return table


def _filled(used: int, size: int) -> tuple[str, str, Text]:
    """Used, size and a bar."""
    share = used / size if size else 0.0
    style = "red" if share > 0.95 else "green"
    return str(used), str(size), Text("█" * round(_BAR * share), style)


def _rows(worker: WorkerState) -> str:
    return f"{worker.running} draining" if worker.draining else str(worker.running)


def _seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.1f} s"


def _short(job_id: str) -> str:
    """The end of an id tells jobs apart; all begin alike."""
    return job_id if len(job_id) <= 16 else f"…{job_id[-15:]}"


def _order(job: JobState) -> int:
    return _LIVE.index(job.state) if job.state in _LIVE else len(_LIVE)
