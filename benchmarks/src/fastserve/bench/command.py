"""What `fastserve simulate` does with its options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastserve.bench import options as read
from fastserve.bench.arrivals import ArrivalKind, Arrivals, LoadError, check_rate
from fastserve.bench.output import display, end, make_folder
from fastserve.bench.report import seconds, table
from fastserve.bench.sim.types import SimOptions
from fastserve.bench.sweep import (
    Report,
    Run,
    SimulationError,
    by_seed,
    crossing,
    curves,
    execute,
    over_seeds,
    sweep,
    write_csv,
)
from fastserve.bench.workloads import Trace
from fastserve.scheduler.core import SchedulerConfig

DEFAULT_JOBS: Final = 4000
DEFAULT_RATE: Final = 2.0
_SUMMARY: Final = {
    "per token": ("per_token_s", "mean"),
    "P95": ("per_token_s", "p95"),
    "P99": ("per_token_s", "p99"),
    "TTFT P99": ("ttft_s", "p99"),
    "e2e P99": ("e2e_s", "p99"),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """The options as typed; those with several values may be empty for the default."""

    workload: str | None
    trace: Path | None
    arrivals: str
    cv: float
    rates: Sequence[str]
    jobs: int | None
    seeds: range
    tenants: int
    tenant_skew: float
    cost_model: Path | None
    workers: int
    worker_speeds: Sequence[str]
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_tokens: str | None
    host_kv_tokens: int | None
    pcie_gbps: float
    copy_ms: float
    block_size: int
    policies: Sequence[str]
    kv_strategy: str
    lease: int
    starvation_threshold: float | None
    assignments: Sequence[str]
    as_json: bool
    out: Path | None
    slo: float | None
    processes: int


def run(asked: Asked) -> None:
    """Simulate and print. Exit status 2 for bad values, 1 for a simulation that went wrong."""
    try:
        runs = plan_runs(asked)
        if asked.slo is not None and not 0 < asked.slo < float("inf"):
            raise ValueError(f"--slo must be greater than 0, not {asked.slo:g}")
        if asked.out is not None:
            make_folder(asked.out)
    except ValueError as error:
        end(str(error), 2)
    try:
        reports = _run_all(runs, asked.processes)
    except LoadError as error:
        end(str(error), 2)
    except SimulationError as error:
        end(str(error), 1)
    if asked.as_json:
        for found in reports:
            typer.echo(json.dumps(found, allow_nan=False))
    else:
        shown = table(reports[0]) if len(reports) == 1 else _summary(reports, asked.slo)
        display(shown)
    if asked.out is not None:
        _write(asked.out, runs, reports, asked.slo)


def plan_runs(asked: Asked) -> list[Run]:
    """All combinations of rates, policies and seeds. Raises ValueError with one sentence."""
    arrivals = Arrivals(cast(ArrivalKind, asked.arrivals), asked.cv)
    workload = read.workload(asked.workload, asked.trace, asked.arrivals)
    given = read.rates(asked.rates)
    for rate in given:
        check_rate(rate)
    rates: list[float | None] = list(given)
    if not rates:
        rates = [None if arrivals.kind == "trace" else DEFAULT_RATE]
    recorded = isinstance(workload, Trace) and arrivals.kind == "trace"
    jobs = asked.jobs or (len(workload) if recorded else DEFAULT_JOBS)
    policies = list(dict.fromkeys(read.listed(asked.policies))) or [SchedulerConfig().policy]
    return [
        Run(
            workload=workload,
            arrivals=arrivals,
            rate=rate,
            jobs=jobs,
            seed=seed,
            options=options,
            tenants=asked.tenants,
            tenant_skew=asked.tenant_skew,
        )
        for options in [_options(asked, policy) for policy in policies]
        for rate in rates
        for seed in asked.seeds
    ]


def _options(asked: Asked, policy: str) -> SimOptions:
    machine = read.hardware(asked.cost_model)
    kv_tokens = read.kv_tokens(asked.kv_tokens, machine)
    host_kv_tokens = asked.host_kv_tokens
    if host_kv_tokens is None:
        host_kv_tokens = (kv_tokens or 0) * read.HOST_KV_FACTOR
    scheduler = read.scheduler_fields(asked.assignments)
    if asked.starvation_threshold is not None:
        scheduler["starvation_s"] = asked.starvation_threshold
    return read.check(
        SimOptions(
            policy=policy,
            hardware=machine,
            max_num_seqs=asked.max_num_seqs,
            max_num_batched_tokens=asked.max_num_batched_tokens,
            kv_tokens=kv_tokens,
            host_kv_tokens=host_kv_tokens,
            pcie_gbps=asked.pcie_gbps,
            copy_ms=asked.copy_ms,
            kv_strategy=read.kv_strategy(asked.kv_strategy),
            block_size=asked.block_size,
            lease=asked.lease,
            speeds=read.speeds(asked.workers, asked.worker_speeds),
            scheduler=scheduler,
        )
    )


def _run_all(runs: Sequence[Run], processes: int) -> list[Report]:
    """Simulate, with a bar on stderr if that is a terminal: jobs of one run, or runs."""
    console = Console(stderr=True)
    words = "jobs" if len(runs) == 1 else "runs"
    bar = Progress(
        TextColumn("simulating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(words),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        if len(runs) == 1:
            task = bar.add_task("", total=runs[0].jobs)
            return [execute(runs[0], lambda ended: bar.update(task, completed=ended))]
        task = bar.add_task("", total=len(runs))
        return sweep(runs, processes, lambda: bar.advance(task))


def _summary(reports: Sequence[Report], slo: float | None) -> Table:
    """A line per policy and rate, means over the seeds; then where each policy crosses the SLO."""
    seeds = len({found["seed"] for found in reports})
    shown = Table(
        title=f"{reports[0]['jobs']:,} jobs, {seeds} seed{'s' * (seeds > 1)}; seconds",
        title_justify="left",
        caption=None if slo is None else _crossings(reports, slo),
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("policy", no_wrap=True)
    any_failed = any(found["failed"] for found in reports)
    for words in ("job/s", *_SUMMARY, "tokens/s", *(["failed"] if any_failed else [])):
        shown.add_column(words, justify="right", no_wrap=True)
    for (policy, rate), group in by_seed(reports).items():
        figures = [over_seeds(group, *figure) for figure in _SUMMARY.values()]
        tokens = sum(found["output_tokens_per_s"] for found in group) / len(group)
        shown.add_row(
            policy,
            "-" if rate is None else f"{rate:g}",
            *(seconds(figure and figure.mean) for figure in figures),
            f"{tokens:,.0f}",
            *([f"{sum(found['failed'] for found in group):,}"] if any_failed else []),
        )
    return shown


def _crossings(reports: Sequence[Report], slo: float) -> str:
    lines = [f"mean per-token latency crosses {slo:g} s at"]
    for policy, curve in curves(reports, "per_token_s", "mean").items():
        rate, points = crossing(curve, slo), list(curve.items())
        if rate is not None:
            words = f"{rate:.2f} job/s"
        elif points[0][1].mean > slo:
            words = f"less than {points[0][0]:g} job/s"
        else:
            words = f"more than {points[-1][0]:g} job/s"
        lines.append(f"  {policy}: {words}")
    return "\n".join(lines)


def _write(folder: Path, runs: Sequence[Run], reports: Sequence[Report], slo: float | None) -> None:
    """runs.csv and the plots; their names go to stderr."""
    from fastserve.bench.plot import plot

    paths = [folder / "runs.csv"]
    write_csv(paths[0], runs, reports)
    options, workload = runs[0].options, runs[0].workload
    title = (
        f"{workload if isinstance(workload, str) else workload.name}, {runs[0].jobs:,} jobs, "
        f"{options.hardware.name}, at most {options.max_num_seqs} rows"
    )
    paths += plot(reports, folder, title=title, slo=slo)
    for path in paths:
        typer.echo(f"wrote {path}", err=True)
