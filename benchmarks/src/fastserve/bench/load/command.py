"""What `fastserve bench serve` does with its options."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastserve.bench.arrivals import LoadError, mean_rate
from fastserve.bench.load import show
from fastserve.bench.load.files import write_csv
from fastserve.bench.load.http import Address, HttpClient, RequestError
from fastserve.bench.load.options import Asked, Level, Load, check, maker_of, requests_of
from fastserve.bench.load.prompts import PromptMaker
from fastserve.bench.load.report import Report, report, warnings
from fastserve.bench.load.run import Runner
from fastserve.bench.load.target import Target
from fastserve.bench.output import display, end, make_folder

_INTERRUPTED: Final = 130


def run(asked: Asked) -> None:
    """Measure and print. Exit status 2 for bad values, 1 if nothing could be measured or every
    request failed, 130 after Ctrl-C (what was measured until then is reported)."""
    try:
        load = check(asked)
        address = Address(asked.url)
        if asked.out is not None:
            make_folder(asked.out)
    except ValueError as error:
        end(str(error), 2)
    raise_file_limit()
    try:
        reports, interrupted = uvloop.run(_measure(asked, load, address))
    except (RequestError, LoadError) as error:
        end(str(error), 1)
    if not reports:
        end("interrupted before the first request had ended", _INTERRUPTED)
    _print(reports, as_json=asked.as_json)
    if asked.out is not None:
        from fastserve.bench.load.plot import plot

        paths = [asked.out / "runs.csv"]
        write_csv(paths[0], reports)
        title = f"{reports[0]['model']}, {load.name}, {load.requests:,} requests a run"
        paths += plot({"": reports}, asked.out, title=title)
        for path in paths:
            typer.echo(f"wrote {path}", err=True)
    if interrupted:
        raise typer.Exit(_INTERRUPTED)
    if all(found["failed"] == found["requests"] for found in reports):
        raise typer.Exit(1)


def raise_file_limit() -> None:
    """As many open connections as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _print(reports: list[Report], *, as_json: bool) -> None:
    if as_json:
        for found in reports:
            typer.echo(json.dumps(found, allow_nan=False))
            for said in warnings(found):
                typer.echo(f"{show.level_of(found)}: {said}", err=True)
        return
    display(show.one(reports[0]) if len(reports) == 1 else show.several(reports))


async def _measure(asked: Asked, load: Load, address: Address) -> tuple[list[Report], bool]:
    key = {"Authorization": f"Bearer {asked.api_key}"} if asked.api_key else {}
    http = HttpClient(address, key)
    reports: list[Report] = []
    with stop_on_signals() as stop:
        try:
            target = await Target.find(http, asked.model, load.asking)
            maker = await maker_of(load, asked, target)
            if asked.warmup:
                await _warm_up(asked, load, target, maker, stop)
            for level in load.levels:
                if stop.is_set():
                    break
                found = await _level(asked, load, level, target, maker, stop)
                if found["requests"]:
                    reports.append(found)
        finally:
            http.close()
        return reports, stop.is_set()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """Set by the first SIGINT or SIGTERM; the second one acts as ever."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def note() -> None:
        stop.set()
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, note)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _warm_up(
    asked: Asked, load: Load, target: Target, maker: PromptMaker | None, stop: asyncio.Event
) -> None:
    """Requests that do not count, one after the other. Raises `RequestError` if one fails."""
    requests, _ = await requests_of(load, asked, load.levels[0], target, maker)
    result = await Runner(target, stop).closed_loop(requests[: asked.warmup], 1)
    for outcome in result.outcomes:
        if outcome.error is not None:
            raise RequestError(f"a warm-up request failed: {outcome.error}")


async def _level(
    asked: Asked,
    load: Load,
    level: Level,
    target: Target,
    maker: PromptMaker | None,
    stop: asyncio.Event,
) -> Report:
    requests, cut = await requests_of(load, asked, level, target, maker)
    with progress(len(requests)) as bar:
        runner = Runner(target, stop, bar)
        if level.concurrency is None:
            result = await runner.open_loop(requests)
        else:
            result = await runner.closed_loop(requests, level.concurrency)
    rate = level.rate
    if level.concurrency is None and rate is None:
        rate = mean_rate(np.array([request.due_s for request in requests]))
    return report(
        result,
        load.slo,
        url=target.http.address.url,
        model=target.model,
        endpoint=load.asking.endpoint,
        workload=asked.prompts.name if asked.prompts is not None else load.name,
        prompt_lengths=maker.exact if maker is not None else "as in the file",
        arrivals=None if level.concurrency is not None else load.arrivals.kind,
        rate=rate,
        concurrency=level.concurrency,
        seed=asked.seed,
        ignore_eos=load.asking.ignore_eos,
        cut_to_length=cut,
    )


@contextlib.contextmanager
def progress(total: int, words: str = "requests") -> Iterator[Callable[[int], None]]:
    """A bar on stderr if that is a terminal; yields what is told how many have ended."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("measuring"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(words),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=total)
        yield lambda ended: bar.update(task, completed=ended)
