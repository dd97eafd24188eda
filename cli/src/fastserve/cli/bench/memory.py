"""`fastserve bench memory`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastserve.cli.bench.options import (
    OUTPUT,
    WHAT,
    WHEN,
    WHO,
    AsJson,
    Model,
    StartTimeout,
    Timeout,
)


def memory(
    model: Model = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Of proactive,reactive,recompute,defer,fcfs and the variants, in this order "
            "(default: all).",
            show_default=False,
            rich_help_panel=WHO,
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FLAGS",
            help="A further deployment, with flags of `fastserve up`; repeat for more.",
            show_default=False,
            rich_help_panel=WHO,
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Of all but fcfs.", rich_help_panel=WHO)
    ] = "fastserve",
    rows: Annotated[
        int, typer.Option(min=1, help="Most jobs in an iteration.", rich_help_panel=WHO)
    ] = 4,
    jobs: Annotated[
        float,
        typer.Option(
            min=1, help="Jobs of average length that KV memory is for.", rich_help_panel=WHO
        ),
    ] = 8,
    load: Annotated[
        list[str] | None,
        typer.Option(
            help="Requests per second over the capacity (default: 0.7,1,1.5).",
            show_default=False,
            rich_help_panel=WHEN,
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(min=1, help="In which the requests of a run are sent.", rich_help_panel=WHEN),
    ] = 45.0,
    capacity_requests: Annotated[
        int,
        typer.Option(min=2, help="By which capacity is measured.", rich_help_panel=WHEN),
    ] = 24,
    workload: Annotated[
        str, typer.Option("--workload", "-w", help="Lengths.", rich_help_panel=WHAT)
    ] = "sharegpt",
    shrink: Annotated[
        float, typer.Option(min=0.01, help="Lengths are divided by it.", rich_help_panel=WHAT)
    ] = 2.0,
    longest: Annotated[
        int, typer.Option(min=2, help="Most tokens of a request.", rich_help_panel=WHAT)
    ] = 512,
    seed: Annotated[int, typer.Option(min=0, help="First seed.", rich_help_panel=WHAT)] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="How many seeds, from --seed on.", rich_help_panel=WHAT)
    ] = 1,
    at_once: Annotated[
        bool,
        typer.Option(
            "--at-once",
            help="All deployments at the same time instead of one after the other: a machine that "
            "varies does so for all. Each has cores of its own; every second they are exchanged.",
            rich_help_panel=WHEN,
        ),
    ] = False,
    start_timeout: StartTimeout = 300.0,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for memory.csv and plots.", show_default=False, rich_help_panel=OUTPUT
        ),
    ] = None,
) -> None:
    """Measure what becomes of KV caches when the device is full, strategy by strategy.

    Starts a FastServe for each, with KV memory for a few jobs, measures the capacity, and sends
    each the same requests on the same schedule, one deployment after the other at each load, so
    that what disturbs the machine disturbs all alike. Examples:

        fastserve bench memory --load 0.7,1,1.5 --out results

        fastserve bench memory --only proactive,plain --variant "plain=--no-kv-write-through"

    On a busy machine the figures mean nothing.
    """
    from fastserve.bench.memory.command import Asked, run

    run(
        Asked(
            model=model,
            only=only or [],
            variant=variant or [],
            policy=policy,
            rows=rows,
            jobs=jobs,
            loads=load or ["0.7,1,1.5"],
            seconds=seconds,
            workload=workload,
            shrink=shrink,
            longest=longest,
            capacity_requests=capacity_requests,
            seed=seed,
            seeds=seeds,
            at_once=at_once,
            start_timeout=start_timeout,
            timeout=timeout,
            as_json=as_json,
            out=out,
        )
    )
