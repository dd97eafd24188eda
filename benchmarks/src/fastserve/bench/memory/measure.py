"""Capacity first, then the same requests on the same schedule for all deployments."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from fastserve.bench.arrivals import Arrivals
from fastserve.bench.load.http import Address, HttpClient
from fastserve.bench.load.plan import Lengths, fit, made
from fastserve.bench.load.prompts import PromptMaker, local_maker
from fastserve.bench.load.report import Report, Slo, report
from fastserve.bench.load.run import Runner
from fastserve.bench.load.target import Asking, Target
from fastserve.bench.load.types import LoadRequest, RunResult
from fastserve.bench.memory.cores import in_turns, shares
from fastserve.bench.memory.stacks import (
    MODEL,
    Sizes,
    Stack,
    Variant,
    command,
    counts,
    metrics_of,
    on_cores,
    read_series,
    state_of,
)
from fastserve.bench.processes import server
from fastserve.bench.sim.types import SimJob
from fastserve.bench.workloads import generate

Say = Callable[[str], None]
# The scheduler sets its gauges, and takes over what its core counted, every half second.
_SETTLE_S: Final = 1.2
# Capacity is measured with lengths of this seed, apart from those of the runs.
_CAPACITY_SEED: Final = 10_007


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent. Lengths are those of the workload over `shrink`, cut to `longest` in all."""

    workload: str
    shrink: float
    longest: int
    loads: Sequence[float]  # over the capacity
    seconds: float  # in which the requests of a run are sent
    seeds: Sequence[int]
    capacity_requests: int
    timeout_s: float


def jobs_of(load: Load, count: int, seed: int, rate: float) -> list[SimJob]:
    """The same lengths for the same seed at every rate, as far as they go."""
    jobs = [
        job._replace(
            prompt_tokens=max(1, round(job.prompt_tokens / load.shrink)),
            output_tokens=max(1, round(job.output_tokens / load.shrink)),
        )
        for job in generate(load.workload, count, seed, Arrivals(), rate)
    ]
    return fit(jobs, Lengths(longest=load.longest))[0]


def mean_tokens(load: Load) -> float:
    """Of a job, prompt and output."""
    jobs = jobs_of(load, 4000, 0, 1.0)
    return sum(job.prompt_tokens + job.output_tokens for job in jobs) / len(jobs)


def blocks_for(load: Load, jobs: float, block_size: int) -> int:
    """KV blocks that so many jobs of average length take at their end, but one of the longest."""
    each = math.ceil(mean_tokens(load) / block_size)
    return max(round(jobs * each), math.ceil(load.longest / block_size))


@contextlib.asynccontextmanager
async def running(
    variant: Variant,
    sizes: Sizes,
    model: Path,
    scratch: Path,
    timeout_s: float,
    request_s: float,
    cores: Collection[int],
) -> Any:
    """A `Stack` until the block ends, on these cores if any are given. Raises `StartError`."""
    state_folder = scratch / variant.name.replace("/", "-").replace(" ", "-")
    argv = command(variant, sizes, model, state_folder)
    if cores:
        argv = on_cores(cores, argv)
    log = state_folder.with_suffix(".log")
    async with server(variant.name, argv, log) as process:
        await process.ready(lambda: state_of(state_folder) is not None, timeout_s)
        state = state_of(state_folder)
        assert state is not None
        http = HttpClient(Address(state["url"]), {})
        try:
            target = Target(http, MODEL, Asking(ignore_eos=True, timeout_s=request_s))
            yield Stack(variant, process, target, metrics_of(state))
        finally:
            http.close()


async def measured(
    stack: Stack, run: Callable[[], Any], stop: asyncio.Event
) -> tuple[RunResult, dict[str, float]]:
    """A run, and what the deployment counted from its begin to its end."""
    before = await _counts(stack)
    result: RunResult = await run()
    if not stop.is_set():
        await asyncio.sleep(_SETTLE_S)
    after = await _counts(stack)
    return result, {name: after[name] - value for name, value in before.items()}


async def _counts(stack: Stack) -> dict[str, float]:
    both = [
        await asyncio.to_thread(read_series, stack.metrics[name])
        for name in ("scheduler", "worker")
    ]
    return counts(*both)


async def capacity(stack: Stack, load: Load, rows: int, maker: PromptMaker) -> float:
    """Requests per second with as many clients as there are rows, so that nobody is preempted.

    Counted in output tokens until the first client finds nothing more to send: what comes after
    that is an engine that empties.
    """
    jobs = jobs_of(load, load.capacity_requests, _CAPACITY_SEED, 1.0)
    requests = made(jobs, maker, _CAPACITY_SEED, {})
    result = await Runner(stack.target, asyncio.Event()).closed_loop(requests, rows)
    return busy_rate(result, sum(job.output_tokens for job in jobs) / len(jobs))


def busy_rate(result: RunResult, mean_output: float) -> float:
    """Requests of `mean_output` tokens per second, until the last one was sent."""
    end = max(outcome.sent for outcome in result.outcomes)
    tokens = 0.0
    for outcome in result.outcomes:
        if outcome.events and outcome.error is None:
            moments = outcome.first + np.concatenate([[0.0], np.cumsum(outcome.gaps)])
            tokens += np.sum(moments <= end) * outcome.output_tokens / outcome.events
    return float(tokens / mean_output / end) if end > 0 else 0.0


async def run_all(
    load: Load,
    sizes: Sizes,
    found: Sequence[Variant],
    model: Path,
    scratch: Path,
    start_timeout_s: float,
    stop: asyncio.Event,
    say: Say,
    *,
    at_once: bool,
) -> list[Report]:
    """Every deployment is started, then each load goes to all of them, one after the other or, each
    on as many cores as the others, at once.

    Raises `StartError`, `LoadError`.
    """
    reports: list[Report] = []
    own = shares(len(found)) if at_once else [()] * len(found)
    async with contextlib.AsyncExitStack() as up:
        stacks = []
        for variant, cores in zip(found, own, strict=True):
            say(f"starting {variant.name}: {' '.join(variant.flags)}")
            one = running(variant, sizes, model, scratch, start_timeout_s, load.timeout_s, cores)
            stacks.append(await up.enter_async_context(one))
        maker = await local_maker(model)
        together = [stacks] if at_once else [[stack] for stack in stacks]
        if at_once:
            pids = [stack.process.pid for stack in stacks]
            await up.enter_async_context(in_turns(pids, own))
        rates: list[float] = []
        for some in together:
            if stop.is_set():
                return reports
            measuring = (capacity(stack, load, sizes.rows, maker) for stack in some)
            for stack, found_rate in zip(some, await asyncio.gather(*measuring), strict=True):
                rates.append(found_rate)
                say(f"capacity of {stack.variant.name}: {found_rate:.2f} requests/s")
        base = float(np.median(rates))
        if base <= 0:
            say("no request was answered")
            return reports
        for seed in load.seeds:
            for over in load.loads:
                rate = over * base
                jobs = jobs_of(load, max(2, round(rate * load.seconds)), seed, rate)
                # Prompts differ from run to run, or else a later one would find them cached.
                requests = made(jobs, maker, seed * 1_000_000 + round(over * 1000), {})
                for some in together:
                    if stop.is_set():
                        return reports
                    runs = (_one(stack, load, requests, over, rate, seed, stop) for stack in some)
                    for told in await asyncio.gather(*runs):
                        reports.append(told)
                        say(_line(told))
            # Each is first in turn: the machine is not the same for the first and the last.
            together = [*together[1:], *together[:1]]
    return reports


async def _one(
    stack: Stack,
    load: Load,
    requests: Sequence[LoadRequest],
    share: float,
    rate: float,
    seed: int,
    stop: asyncio.Event,
) -> Report:
    runner = Runner(stack.target, stop)
    result, counted = await measured(stack, partial(runner.open_loop, requests), stop)
    found = report(
        result,
        Slo(),
        variant=stack.variant.name,
        load=share,
        rate=rate,
        seed=seed,
        workload=load.workload,
        concurrency=None,
        ignore_eos=True,
        cut_to_length=0,
    )
    row_s = counted["row_s"]
    iterations = counted["decode_iterations"]
    return found | {
        **counted,
        "preemptions": sum(v for name, v in counted.items() if name.startswith("preempted_")),
        "kv_wait_share": counted["kv_wait_s"] / row_s if row_s else 0.0,
        "decode_iteration_s": counted["decode_s"] / iterations if iterations else None,
    }


def _line(found: Report) -> str:
    mean = found["per_token_s"]["mean"]
    return (
        f"{found['variant']} at {found['load']:g} (seed {found['seed']}): "
        f"{'-' if mean is None else f'{mean:.4f}'} s per token, "
        f"waits for KV {found['kv_wait_share']:.2%}, {found['makespan_s']:.0f} s"
    )
