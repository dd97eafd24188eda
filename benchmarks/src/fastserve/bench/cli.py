"""`fastserve simulate`.

Imported whenever `fastserve` starts: numpy and everything else that takes time is imported in the
command.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

_LOAD = "Load"
_MACHINE = "Machine"
_SCHEDULER = "Scheduler"
_OUTPUT = "Output"


class OneSentence(TyperCommand):
    """A command whose usage errors are one sentence on stderr, exit status 2."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        try:
            return super().make_context(*args, **extra)
        except typer.TyperException as error:
            typer.secho(error.format_message(), err=True, fg="red")
            raise typer.Exit(error.exit_code) from None


def simulate(
    workload: Annotated[
        str | None,
        typer.Option(
            "--workload",
            "-w",
            help="sharegpt (default), alpaca, azure-conv, azure-code, longtail, or a mixture in "
            "equal shares such as azure-code+alpaca.",
            show_default=False,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the columns arrival_s,prompt_tokens,output_tokens, instead of a "
            "workload. Jobs are drawn from it at random, unless its arrivals are asked for.",
            show_default=False,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    arrivals: Annotated[
        str,
        typer.Option(
            help="poisson, gamma (see --cv) or trace (as recorded; stretched to --rate if given).",
            rich_help_panel=_LOAD,
        ),
    ] = "poisson",
    cv: Annotated[
        float,
        typer.Option(
            help="Standard deviation over mean of gamma gaps: 1 is Poisson, more is bursty.",
            rich_help_panel=_LOAD,
        ),
    ] = 1.0,
    rate: Annotated[
        list[str] | None,
        typer.Option(
            "--rate",
            "-r",
            help="Jobs per second (default: 2, or as recorded); several make a sweep: 1,2,3.",
            show_default=False,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-n",
            min=1,
            help="Number of jobs (default: 4000; with its arrivals, those of the trace).",
            show_default=False,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="First seed.", rich_help_panel=_LOAD)] = 0,
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many seeds, from --seed on; several make a sweep.",
            rich_help_panel=_LOAD,
        ),
    ] = 1,
    tenants: Annotated[
        int, typer.Option(min=1, help="Spread jobs over so many tenants.", rich_help_panel=_LOAD)
    ] = 1,
    tenant_skew: Annotated[
        float,
        typer.Option(
            help="Tenant k sends in proportion to 1 / k^SKEW; 0: all alike.", rich_help_panel=_LOAD
        ),
    ] = 0.0,
    cost_model: Annotated[
        Path | None,
        typer.Option(
            help="JSON with the times of an iteration (default: OPT-13B on one A100-80GB).",
            show_default=False,
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(min=1, help="Worker groups, each such a machine.", rich_help_panel=_MACHINE),
    ] = 1,
    worker_speed: Annotated[
        list[str] | None,
        typer.Option(
            help="How fast each of them is, such as 1,1,0.5 (default: all alike).",
            show_default=False,
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Most jobs in an iteration.", rich_help_panel=_MACHINE)
    ] = 16,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in an iteration.", rich_help_panel=_MACHINE)
    ] = 2048,
    kv_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Tokens that fit in device memory, or unlimited (default: of the cost model).",
            show_default=False,
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    host_kv_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens that fit in host memory (default: ten times --kv-tokens).",
            show_default=False,
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    pcie_gbps: Annotated[
        float,
        typer.Option(help="Host link, 10^9 bytes/s each way.", rich_help_panel=_MACHINE),
    ] = 25.0,
    copy_ms: Annotated[
        float,
        typer.Option(
            min=0,
            help="What a copy to or from the host takes beside its bytes (calls, waiting).",
            rich_help_panel=_MACHINE,
        ),
    ] = 0.0,
    block_size: Annotated[
        int, typer.Option(min=1, help="Tokens in a KV block.", rich_help_panel=_MACHINE)
    ] = 16,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            help="fastserve, skip-join-mlfq, mlfq, fcfs, fixed-priority, hrrn or srpt (default: "
            "that of the scheduler); several make a sweep.",
            show_default=False,
            rich_help_panel=_SCHEDULER,
        ),
    ] = None,
    kv_strategy: Annotated[
        str,
        typer.Option(help="proactive, reactive, recompute or defer.", rich_help_panel=_SCHEDULER),
    ] = "proactive",
    lease: Annotated[
        int,
        typer.Option(min=1, help="Iterations that a plan is good for.", rich_help_panel=_SCHEDULER),
    ] = 4,
    starvation_threshold: Annotated[
        float | None,
        typer.Option(
            help="Seconds a job waits before it is lifted; inf: never (default: that of the "
            "scheduler).",
            show_default=False,
            rich_help_panel=_SCHEDULER,
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other option of the scheduler, such as quantum_ratio=4; repeat for more.",
            show_default=False,
            rich_help_panel=_SCHEDULER,
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object per run, a line each.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for runs.csv, latency.png and latency.svg.",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    slo: Annotated[
        float | None,
        typer.Option(
            help="Seconds per token: a line in the plot, and the rate where the mean crosses it.",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Simulations of a sweep at a time (default: one per core).",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> None:
    """Simulate a load on the real scheduler, without a GPU, in a fraction of the time.

    The scheduler is the one that serves; only the worker is replaced, by a formula for the time
    that an iteration takes. The same command gives the same figures. One run prints a table:

        fastserve simulate

        fastserve simulate --workload alpaca --rate 14 --policy fcfs --json

        fastserve simulate --trace my.csv --arrivals trace --max-num-seqs 64

    Bursts, long prompts among short ones, little memory, several tenants:

        fastserve simulate -w azure-code+alpaca --arrivals gamma --cv 3 --rate 1.5

        fastserve simulate --kv-tokens 15300 --kv-strategy reactive --rate 1.7

        fastserve simulate --tenants 8 --tenant-skew 1 --set levels=6

    Several worker groups behind one scheduler, one of them slow:

        fastserve simulate --workers 3 --worker-speed 1,1,0.5 --rate 6

    Several rates, policies or seeds make a sweep, with a CSV and plots in --out:

        fastserve simulate -r 1,2,3,4 -p fcfs,fastserve --seeds 5 --slo 0.3 --out results

    A job that fails (too long for the memory) counts with the worst latency of its run.
    """
    from fastserve.bench.command import Asked, run

    run(
        Asked(
            workload=workload,
            trace=trace,
            arrivals=arrivals,
            cv=cv,
            rates=rate or [],
            jobs=jobs,
            seeds=range(seed, seed + seeds),
            tenants=tenants,
            tenant_skew=tenant_skew,
            cost_model=cost_model,
            workers=workers,
            worker_speeds=worker_speed or [],
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_tokens=kv_tokens,
            host_kv_tokens=host_kv_tokens,
            pcie_gbps=pcie_gbps,
            copy_ms=copy_ms,
            block_size=block_size,
            policies=policy or [],
            kv_strategy=kv_strategy,
            lease=lease,
            starvation_threshold=starvation_threshold,
            assignments=assignments or [],
            as_json=as_json,
            out=out,
            slo=slo,
            processes=processes or os.cpu_count() or 1,
        )
    )
