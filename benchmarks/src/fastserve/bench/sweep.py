"""Many simulations side by side, and what they say together."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import connection
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from fastserve.bench.arrivals import Arrivals, mean_rate
from fastserve.bench.output import write_rows
from fastserve.bench.report import report
from fastserve.bench.sim.engine import StuckError, simulate
from fastserve.bench.sim.types import SimOptions
from fastserve.bench.workloads import Trace, generate

Report = dict[str, Any]

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T_975: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_Z_975: Final = 1.960


class SimulationError(Exception):
    """A simulation that did not get to its end; one sentence that names it."""


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation. `rate` in jobs per second; None: as recorded in the trace."""

    workload: str | Trace
    arrivals: Arrivals
    rate: float | None
    jobs: int
    seed: int
    options: SimOptions
    tenants: int = 1
    tenant_skew: float = 0.0


class Estimate(NamedTuple):
    """Mean over seeds, and a 95 % interval; `low` = `high` = `mean` for a single seed."""

    mean: float
    low: float
    high: float


Curve = dict[float, Estimate]  # by rate


def execute(run: Run, progress: Callable[[int], None] | None = None) -> Report:
    """The report of one run. Raises `SimulationError`, `LoadError` if there cannot be such jobs."""
    jobs = generate(
        run.workload,
        run.jobs,
        run.seed,
        run.arrivals,
        run.rate,
        tenants=run.tenants,
        tenant_skew=run.tenant_skew,
    )
    options = run.options
    try:
        result = simulate(jobs, options, progress)
    except (StuckError, ValueError) as error:
        rate = "" if run.rate is None else f" at {run.rate:g} job/s"
        raise SimulationError(f"{options.policy}{rate}, seed {run.seed}: {error}") from error
    return report(
        result,
        policy=options.policy,
        rate=mean_rate(result.arrival_s) if run.rate is None else run.rate,
        seed=run.seed,
        kv_bytes_per_token=options.hardware.kv_bytes_per_token,
    )


def sweep(runs: Sequence[Run], processes: int, done: Callable[[], None]) -> list[Report]:
    """The reports of all runs, in their order, from so many worker processes.

    `done` is called after each run. Raises as `execute` does; what runs then is ended.
    """
    if processes == 1 or len(runs) == 1:
        reports = []
        for run in runs:
            reports.append(execute(run))
            done()
        return reports
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(processes, len(runs)),
        # Not forked: numpy's and rich's threads do not survive that.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )
    try:
        futures = [pool.submit(execute, run) for run in runs]
        for future in as_completed(futures):
            future.result()
            done()
    except BrokenProcessPool:
        raise SimulationError("a worker process was killed, perhaps for lack of memory") from None
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    pool.shutdown()
    return [future.result() for future in futures]


def _start_worker() -> None:
    """Ends with its parent, however that ends, and without a traceback at Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def write_csv(path: Path, runs: Sequence[Run], reports: Iterable[Report]) -> None:
    """One row per run: its options, then its report; `per_token_s_p95` and the like in seconds."""
    write_rows(path, [_flat(run, found) for run, found in zip(runs, reports, strict=True)])


def _flat(run: Run, found: Report) -> dict[str, Any]:
    options = run.options
    row: dict[str, Any] = {
        "policy": options.policy,
        "rate": found["rate"],
        "seed": run.seed,
        "workload": run.workload if isinstance(run.workload, str) else run.workload.name,
        "arrivals": run.arrivals.kind,
        "cv": run.arrivals.cv if run.arrivals.kind == "gamma" else None,
        "hardware": options.hardware.name,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "kv_tokens": options.kv_tokens,
        "host_kv_tokens": options.host_kv_tokens,
        "pcie_gbps": options.pcie_gbps,
        "copy_ms": options.copy_ms,
        "kv_strategy": str(options.kv_strategy),
        "block_size": options.block_size,
        "lease": options.lease,
        "scheduler": " ".join(f"{name}={value}" for name, value in options.scheduler.items()),
        "tenant_skew": run.tenant_skew,
    }
    for name, value in found.items():
        if isinstance(value, dict):
            row |= {f"{name}_{part}": part_value for part, part_value in value.items()}
        else:
            row.setdefault(name, value)
    return row


def estimate(values: Sequence[float]) -> Estimate:
    """Of latencies, greater than 0, one per seed.

    The interval is Student's t for the logarithms: what a seed does to a queue multiplies its
    latencies, so these are nearer to a normal distribution, and its lower end stays above 0.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, mean, mean)
    logs = np.log(values)
    half = float(logs.std(ddof=1)) / math.sqrt(len(logs)) * _t_975(len(logs) - 1)
    middle = float(logs.mean())
    return Estimate(mean, math.exp(middle - half), math.exp(middle + half))


def _t_975(freedom: int) -> float:
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    # The first term of the expansion around the normal quantile: right to three digits from 30 on.
    return _Z_975 + (_Z_975**3 + _Z_975) / (4 * freedom)


def over_seeds(reports: Iterable[Report], metric: str, statistic: str) -> Estimate | None:
    """Of one figure, such as "ttft_s", "p99"; None if a run has none because all jobs failed."""
    values = [found[metric][statistic] for found in reports]
    return None if None in values else estimate(values)


def by_seed(reports: Iterable[Report]) -> dict[tuple[str, float | None], list[Report]]:
    """Reports that differ in the seed alone, by policy and rate, in the order given."""
    groups: dict[tuple[str, float | None], list[Report]] = {}
    for found in reports:
        groups.setdefault((found["policy"], found["rate"]), []).append(found)
    return groups


def curves(reports: Iterable[Report], metric: str, statistic: str) -> dict[str, Curve]:
    """A figure over the rate, ascending, by policy; without points where there is no figure."""
    found: dict[str, Curve] = {}
    for (policy, rate), group in by_seed(reports).items():
        point = over_seeds(group, metric, statistic)
        if rate is not None and point is not None:
            found.setdefault(policy, {})[rate] = point
    return {policy: dict(sorted(curve.items())) for policy, curve in found.items()}


def crossing(curve: Curve, slo: float) -> float | None:
    """The rate at which the mean of a curve first rises above `slo`, interpolated linearly.

    None if it never does, or is above it from the start.
    """
    points = [(rate, point.mean) for rate, point in curve.items()]
    for (rate, value), (next_rate, next_value) in pairwise(points):
        if value <= slo < next_value:
            return rate + (next_rate - rate) * (slo - value) / (next_value - value)
        if value > slo:
            return None
    return None
