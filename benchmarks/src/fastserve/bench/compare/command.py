"""What `fastserve bench compare` does with its options."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import typer
import uvloop

from fastserve.bench.arrivals import Arrivals, LoadError, check_rate
from fastserve.bench.compare import contenders as those
from fastserve.bench.compare.contenders import Contender, Missing, Needs
from fastserve.bench.compare.show import table
from fastserve.bench.load.command import progress, raise_file_limit, stop_on_signals
from fastserve.bench.load.files import write_csv
from fastserve.bench.load.http import Address, HttpClient
from fastserve.bench.load.options import concurrencies
from fastserve.bench.load.plan import Lengths, fit, made
from fastserve.bench.load.prompts import local_maker
from fastserve.bench.load.report import Report, Slo, report, warnings
from fastserve.bench.load.run import Runner
from fastserve.bench.load.target import Asking, Target
from fastserve.bench.load.types import LoadRequest
from fastserve.bench.options import listed
from fastserve.bench.options import rates as read_rates
from fastserve.bench.output import display, end, make_folder
from fastserve.bench.processes import ServerProcess, StartError, free_port, model_folder, server
from fastserve.bench.workloads import generate

_INTERRUPTED: Final = 130
_WARM_TOKENS: Final = 8
_READY_TIMEOUT_S: Final = 120.0  # of one request that asks whether a server is ready


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of `fastserve bench compare` as typed."""

    model: str | None
    gguf: Path | None
    fastserve: Sequence[str]
    vllm: Path | None
    llama_server: Path | None
    llama_types: Sequence[str]
    openvino: Path | None
    transformers: Path | None
    only: Sequence[str]
    concurrency: Sequence[str]
    rates: Sequence[str]
    requests: int | None
    prompt_tokens: int
    output_tokens: int
    seed: int
    repeat: int
    start_timeout: float
    timeout: float
    as_json: bool
    out: Path | None


@dataclass(frozen=True, slots=True)
class Level:
    """One run: so many clients, or a rate."""

    concurrency: int | None
    rate: float | None
    requests: int


def run(asked: Asked) -> None:
    """Measure and print. Exit status 2 for bad values, 1 if FastServe itself could not be
    measured, 130 after Ctrl-C."""
    try:
        levels = plan_levels(asked)
        if asked.out is not None:
            make_folder(asked.out)
    except ValueError as error:
        end(str(error), 2)
    raise_file_limit()
    with tempfile.TemporaryDirectory(prefix="fastserve-bench-") as scratch:
        try:
            folder = model_folder(asked.model)
            found, missing = _contenders(asked, levels, folder, Path(scratch))
            measuring = _measure(asked, levels, found, folder, Path(scratch))
            reports, failed, interrupted = uvloop.run(measuring)
        except (StartError, LoadError) as error:
            end(str(error), 1)
    _print(asked, reports, [*missing, *failed])
    if interrupted:
        raise typer.Exit(_INTERRUPTED)
    if not reports or any(one.name.startswith(those.FASTSERVE) for one in failed):
        raise typer.Exit(1)


def plan_levels(asked: Asked) -> list[Level]:
    """Raises ValueError with one sentence."""
    rates = read_rates(asked.rates)
    for rate in rates:
        check_rate(rate)
    counts = concurrencies(asked.concurrency)
    levels = [Level(count, None, asked.requests or max(4, 2 * count)) for count in counts]
    levels += [Level(None, rate, asked.requests or 64) for rate in rates]
    if not levels:
        raise ValueError("give --concurrency or --rate")
    return levels


def _contenders(
    asked: Asked, levels: Sequence[Level], folder: Path, scratch: Path
) -> tuple[list[Contender], list[Missing]]:
    given = asked.model
    gguf = asked.gguf or (Path(given) if given and given.endswith(".gguf") else None)
    if given is None:
        gguf = gguf or those.default_gguf()
    streams = max(level.concurrency or 0 for level in levels) or 64
    length = asked.prompt_tokens + asked.output_tokens
    cores = len(os.sched_getaffinity(0))
    needs = Needs(folder, gguf, streams, length, cores)
    flags = [text.split() for text in asked.fastserve] or [[]]
    types = listed(asked.llama_types)
    all_of_them: dict[str, Callable[[], Sequence[Contender | Missing]]] = {
        "fastserve": lambda: [
            those.fastserve(needs, words, scratch, at) for at, words in enumerate(flags)
        ],
        "vllm": lambda: [those.vllm(needs, asked.vllm)],
        "llama.cpp": lambda: those.llama_cpp(needs, asked.llama_server, types, scratch),
        "openvino": lambda: those.openvino(
            needs, asked.openvino, types, asked.llama_server, scratch
        ),
        "transformers": lambda: [those.transformers(needs, asked.transformers)],
    }
    wanted = listed(asked.only) or list(all_of_them)
    for name in wanted:
        if name not in all_of_them:
            raise LoadError(f"--only: {name!r} is unknown: choose of {', '.join(all_of_them)}")
    both = [one for name in wanted for one in all_of_them[name]()]
    found = [one for one in both if isinstance(one, Contender)]
    return found, [one for one in both if isinstance(one, Missing)]


async def _measure(
    asked: Asked,
    levels: Sequence[Level],
    found: Sequence[Contender],
    tokenizer: Path,
    scratch: Path,
) -> tuple[list[Report], list[Missing], bool]:
    """One contender after the other."""
    reports: list[Report] = []
    failed: list[Missing] = []
    with stop_on_signals() as stop:
        for number, contender in enumerate(found):
            if stop.is_set():
                break
            try:
                log = scratch / f"{number}.log"
                reports += await _one(asked, levels, contender, tokenizer, log, stop)
            except StartError as error:
                failed.append(Missing(contender.name, str(error)))
        return reports, failed, stop.is_set()


async def _one(
    asked: Asked,
    levels: Sequence[Level],
    contender: Contender,
    tokenizer: Path,
    log: Path,
    stop: asyncio.Event,
) -> list[Report]:
    """Start, warm up, measure every level, stop. Raises `StartError`."""
    port = free_port()
    address = Address(f"http://{those.HOST}:{port}")
    asking = Asking(ignore_eos=contender.ignore_eos, timeout_s=asked.timeout, extra=contender.extra)
    http = HttpClient(address, {})
    target = Target(http, contender.model, asking)
    _say(f"{contender.name}: starting")
    try:
        async with server(contender.name, contender.command(port), log, contender.env) as running:
            started = await _ready(running, target, asked.start_timeout, stop)
            if stop.is_set():
                return []
            _say(f"{contender.name}: ready after {started:.0f} s, warming up")
            most = max(level.concurrency or 1 for level in levels)
            warm = await _requests(asked, Level(most, None, most), tokenizer, seed=asked.seed + 1)
            short = [LoadRequest(0.0, one.prompt, None, _WARM_TOKENS) for one in warm]
            await Runner(target, stop).closed_loop(short, most)
            return await _levels(asked, levels, contender, target, tokenizer, stop)
    finally:
        http.close()


async def _levels(
    asked: Asked,
    levels: Sequence[Level],
    contender: Contender,
    target: Target,
    tokenizer: Path,
    stop: asyncio.Event,
) -> list[Report]:
    reports = []
    for level in levels:
        requests = await _requests(asked, level, tokenizer, seed=asked.seed)
        runs = []
        for _ in range(asked.repeat):
            if stop.is_set():
                break
            with progress(len(requests), f"requests, {contender.name}") as bar:
                runner = Runner(target, stop, bar)
                if level.concurrency is not None:
                    result = await runner.closed_loop(requests, level.concurrency)
                else:
                    result = await runner.open_loop(requests)
            if result.outcomes:
                runs.append(
                    report(
                        result,
                        Slo(),
                        contender=contender.name,
                        weights=contender.weights,
                        concurrency=level.concurrency,
                        rate=level.rate,
                        seed=asked.seed,
                        asked_prompt_tokens=asked.prompt_tokens,
                        asked_output_tokens=asked.output_tokens,
                        ignore_eos=contender.ignore_eos,
                        cut_to_length=0,
                        notes=list(contender.notes),
                    )
                )
        if runs:  # noise of the machine only ever slows a run down
            reports.append(max(runs, key=lambda found: float(found["output_tokens_per_s"])))
    return reports


async def _ready(
    running: ServerProcess, target: Target, timeout_s: float, stop: asyncio.Event
) -> float:
    """Wait until a request of one token is answered; the seconds that took. Raises `StartError`."""
    asking = Asking(timeout_s=_READY_TIMEOUT_S, extra=target.asking.extra)
    probe = Target(target.http, target.model, asking)

    async def answers() -> bool:
        if stop.is_set():
            return True
        outcome = await probe.run(LoadRequest(0.0, "the", None, 1), 0.0, time.perf_counter())
        return outcome.error is None

    return await running.ready(answers, timeout_s)


async def _requests(asked: Asked, level: Level, tokenizer: Path, *, seed: int) -> list[LoadRequest]:
    """The same for every contender: lengths fixed, prompts made with the tokenizer they share."""
    maker = await local_maker(tokenizer)
    jobs = generate("alpaca", level.requests, seed, Arrivals(), level.rate or 1.0)
    jobs, _ = fit(jobs, Lengths(asked.prompt_tokens, asked.output_tokens))
    return made(jobs, maker, seed, {})


def _say(words: str) -> None:
    typer.echo(words, err=True)


def _print(asked: Asked, reports: Sequence[Report], missing: Sequence[Missing]) -> None:
    if asked.as_json:
        for found in reports:
            typer.echo(json.dumps(found, allow_nan=False))
    elif reports:
        display(table(reports))
    for found in reports:
        level = found["concurrency"] or found["rate"]
        for said in warnings(found):
            _say(f"! {found['contender']} at {level:g}: {said}")
    for name, notes in {found["contender"]: found["notes"] for found in reports}.items():
        for note in notes:
            _say(f"! {name}: {note}")
    for one in missing:
        _say(f"skipped {one.name}: {one.why}")
    if asked.out is None or not reports:
        return
    from fastserve.bench.load.plot import plot

    paths = [asked.out / "compare.csv"]
    write_csv(paths[0], [{**found, "notes": "; ".join(found["notes"])} for found in reports])
    for kind in ("concurrency", "rate"):
        curves: dict[str, list[Report]] = {}
        for found in reports:
            if found[kind] is not None:
                curves.setdefault(found["contender"], []).append(found)
        if curves:
            title = f"{asked.prompt_tokens} prompt tokens, {asked.output_tokens} new tokens"
            paths += plot(curves, asked.out, title=title, name=f"compare-{kind}")
    for path in paths:
        _say(f"wrote {path}")
