"""Jobs of a built-in workload or of a trace, the same ones for the same seed."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fastserve.bench.arrivals import Arrivals, LoadError, random_arrivals, recorded_arrivals
from fastserve.bench.sim.types import SimJob
from fastserve.bench.workloads.tables import Lengths, draw, tables
from fastserve.bench.workloads.trace import Trace

# The tail of `longtail`: documents among short questions. Lengths as in `alpaca`, but so many of
# the prompts are between these lengths, their logarithms uniform (mean 8,656 tokens).
LONG_SHARE: Final = 0.05
LONG_PROMPT_TOKENS: Final = (4_000, 16_000)

WORKLOADS: Final = ("sharegpt", "alpaca", "azure-conv", "azure-code", "longtail")


def check_workload(workload: str) -> tuple[str, ...]:
    """The parts of a workload; `a+b` is a mixture in equal shares. Raises `LoadError`."""
    parts = tuple(part.strip() for part in workload.split("+"))
    for part in parts:
        if part not in WORKLOADS:
            known = ", ".join(WORKLOADS)
            raise LoadError(
                f"workload {part!r} is unknown: choose one of {known}, or a mixture such as "
                "azure-code+alpaca"
            )
    return parts


def generate(
    workload: str | Trace,
    jobs: int,
    seed: int,
    arrivals: Arrivals,
    rate: float | None,
    *,
    tenants: int = 1,
    tenant_skew: float = 0.0,
) -> list[SimJob]:
    """`jobs` jobs by arrival, `rate` of them per second.

    Jobs of a trace: with the arrivals of the trace, its first `jobs` rows, stretched to `rate` if
    one is given; with other arrivals, rows drawn at random (with replacement). Lengths, arrivals
    and tenants have random numbers of their own: a change in one leaves the others as they were.
    Tenant k of `tenants` sends in proportion to k ** -tenant_skew (0: all alike). Raises
    `LoadError`.
    """
    if jobs < 1:
        raise LoadError(f"there must be at least 1 job, not {jobs}")
    lengths_rng, arrivals_rng, tenants_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)
    )
    if arrivals.kind == "trace":
        if not isinstance(workload, Trace) or workload.arrival_s is None:
            raise LoadError("only a trace has arrivals of its own")
        if jobs > len(workload):
            raise LoadError(f"{workload.name} has {len(workload)} jobs, not {jobs}")
        moments = recorded_arrivals(workload.arrival_s[:jobs], rate)
        lengths = workload.prompt_tokens[:jobs], workload.output_tokens[:jobs]
    else:
        if rate is None:
            raise LoadError(f"{arrivals.kind} arrivals need a rate")
        moments = random_arrivals(arrivals, jobs, rate, arrivals_rng)
        if isinstance(workload, Trace):
            rows = lengths_rng.integers(len(workload), size=jobs)
            lengths = workload.prompt_tokens[rows], workload.output_tokens[rows]
        else:
            lengths = _mixture(check_workload(workload), jobs, lengths_rng)
    names = _tenants(tenants, tenant_skew, jobs, tenants_rng)
    columns = (moments.tolist(), lengths[0].tolist(), lengths[1].tolist(), names)
    return list(map(SimJob, *columns))


def _mixture(parts: tuple[str, ...], jobs: int, rng: np.random.Generator) -> Lengths:
    if len(parts) == 1:
        return _lengths(parts[0], jobs, rng)
    part_of = rng.integers(len(parts), size=jobs)
    prompts, outputs = np.empty(jobs, np.int64), np.empty(jobs, np.int64)
    for number, part in enumerate(parts):
        here = part_of == number
        prompts[here], outputs[here] = _lengths(part, int(here.sum()), rng)
    return prompts, outputs


def _lengths(workload: str, jobs: int, rng: np.random.Generator) -> Lengths:
    if workload != "longtail":
        return draw(tables()[workload], jobs, rng)
    prompts, outputs = draw(tables()["alpaca"], jobs, rng)
    long = rng.random(jobs) < LONG_SHARE
    shortest, longest = (math.log(tokens) for tokens in LONG_PROMPT_TOKENS)
    prompts[long] = np.rint(np.exp(rng.uniform(shortest, longest, int(long.sum()))))
    return prompts, outputs


def _tenants(tenants: int, skew: float, jobs: int, rng: np.random.Generator) -> list[str]:
    if tenants < 1:
        raise LoadError(f"there must be at least 1 tenant, not {tenants}")
    if not (math.isfinite(skew) and skew >= 0):
        raise LoadError(f"the skew of tenants must be 0 or more, not {skew:g}")
    if tenants == 1:
        return ["default"] * jobs
    shares: NDArray[np.float64] = np.arange(1, tenants + 1, dtype=np.float64) ** -skew
    numbers = rng.choice(tenants, size=jobs, p=shares / shares.sum())
    names = [f"tenant-{number}" for number in range(1, tenants + 1)]
    return [names[number] for number in numbers.tolist()]
