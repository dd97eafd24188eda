"""What `fastserve bench memory` does with its options."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import typer
import uvloop

from fastserve.bench.arrivals import LoadError
from fastserve.bench.load.command import raise_file_limit, stop_on_signals
from fastserve.bench.load.files import write_csv
from fastserve.bench.load.report import Report, warnings
from fastserve.bench.memory.measure import Load, blocks_for, mean_tokens, run_all
from fastserve.bench.memory.show import table
from fastserve.bench.memory.stacks import Sizes, Variant, variants
from fastserve.bench.options import HOST_KV_FACTOR, listed
from fastserve.bench.output import display, end, make_folder
from fastserve.bench.processes import StartError, model_folder
from fastserve.bench.workloads import check_workload

_INTERRUPTED: Final = 130
_BLOCK_SIZE: Final = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of `fastserve bench memory` as typed."""

    model: str | None
    only: Sequence[str]
    variant: Sequence[str]
    policy: str
    rows: int
    jobs: float
    loads: Sequence[str]
    seconds: float
    workload: str
    shrink: float
    longest: int
    capacity_requests: int
    seed: int
    seeds: int
    at_once: bool
    start_timeout: float
    timeout: float
    as_json: bool
    out: Path | None


def run(asked: Asked) -> None:
    """Measure and print. Exit status 2 for bad values, 1 if a deployment does not come up, 130
    after Ctrl-C (what was measured until then is reported)."""
    try:
        load = check(asked)
        found = variants(asked.only, asked.variant, asked.policy)
        if asked.out is not None:
            make_folder(asked.out)
    except ValueError as error:
        end(str(error), 2)
    raise_file_limit()
    blocks = blocks_for(load, asked.jobs, _BLOCK_SIZE)
    sizes = Sizes(asked.rows, blocks, HOST_KV_FACTOR * blocks, _BLOCK_SIZE, asked.longest)
    title = (
        f"{load.workload} / {load.shrink:g} cut to {load.longest} tokens (mean "
        f"{mean_tokens(load):.0f}), {sizes.rows} rows, {blocks} KV blocks for {asked.jobs:g} jobs, "
        f"{asked.policy}, {len(load.seeds)} x {load.seconds:g} s"
    )
    _say(title)
    with tempfile.TemporaryDirectory(prefix="fastserve-bench-") as scratch:
        try:
            measuring = _measure(asked, load, sizes, found, Path(scratch))
            reports, interrupted = uvloop.run(measuring)
        except (StartError, LoadError) as error:
            end(str(error), 1)
    if not reports:
        end("nothing was measured", _INTERRUPTED if interrupted else 1)
    _print(asked, reports, title)
    if interrupted:
        raise typer.Exit(_INTERRUPTED)


def check(asked: Asked) -> Load:
    """Raises ValueError with one sentence."""
    check_workload(asked.workload)
    loads = []
    for text in listed(asked.loads):
        try:
            loads.append(float(text))
        except ValueError:
            raise LoadError(f"--load: {text!r} is not a number") from None
        if not 0 < loads[-1] < float("inf"):
            raise LoadError(f"--load must be greater than 0, not {text}")
    if not loads:
        raise LoadError("give --load")
    return Load(
        workload=asked.workload,
        shrink=asked.shrink,
        longest=asked.longest,
        loads=list(dict.fromkeys(loads)),
        seconds=asked.seconds,
        seeds=range(asked.seed, asked.seed + asked.seeds),
        capacity_requests=asked.capacity_requests,
        timeout_s=asked.timeout,
    )


async def _measure(
    asked: Asked, load: Load, sizes: Sizes, found: Sequence[Variant], scratch: Path
) -> tuple[list[Report], bool]:
    with stop_on_signals() as stop:
        folder = model_folder(asked.model)
        reports = await run_all(
            load, sizes, found, folder, scratch, asked.start_timeout, stop, _say,
            at_once=asked.at_once,
        )  # fmt: skip
        return reports, stop.is_set()


def _say(words: str) -> None:
    typer.echo(words, err=True)


def _print(asked: Asked, reports: Sequence[Report], title: str) -> None:
    if asked.as_json:
        for found in reports:
            typer.echo(json.dumps(found, allow_nan=False))
    else:
        display(table(reports, title))
    for found in reports:
        for said in warnings(found):
            _say(f"! {found['variant']} at {found['load']:g}, seed {found['seed']}: {said}")
    if asked.out is None:
        return
    from fastserve.bench.memory.plot import plot

    paths = [asked.out / "memory.csv"]
    write_csv(paths[0], reports)
    paths += plot(reports, asked.out, title=title)
    for path in paths:
        _say(f"wrote {path}")
