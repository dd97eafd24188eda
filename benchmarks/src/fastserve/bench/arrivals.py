"""When jobs arrive."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

ArrivalKind = Literal["poisson", "gamma", "trace"]
ARRIVAL_KINDS: Final[tuple[ArrivalKind, ...]] = ("poisson", "gamma", "trace")


class LoadError(ValueError):
    """Jobs that cannot be had; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How the gaps between jobs are distributed; `trace`: as recorded, needs a trace.

    `cv` is the coefficient of variation (standard deviation over mean) of gamma gaps: 1 is Poisson,
    more is bursty, less is regular. Raises `LoadError` when it makes no sense.
    """

    kind: ArrivalKind = "poisson"
    cv: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ARRIVAL_KINDS:
            known = ", ".join(ARRIVAL_KINDS)
            raise LoadError(f"arrivals {self.kind!r} are unknown: choose one of {known}")
        if not (math.isfinite(self.cv) and self.cv > 0):
            raise LoadError(f"the CV of arrivals must be greater than 0, not {self.cv:g}")


def random_arrivals(
    arrivals: Arrivals, jobs: int, rate: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Seconds at which `jobs` jobs arrive, `rate` of them per second in the mean.

    One seed gives the same arrivals at every rate but for the scale, so that two rates differ by
    the rate alone. Raises `LoadError` for a rate that makes no sense, and for `trace`.
    """
    check_rate(rate)
    if arrivals.kind == "poisson":
        gaps = rng.exponential(1.0, jobs)
    elif arrivals.kind == "gamma":
        shape = 1.0 / arrivals.cv**2
        gaps = rng.gamma(shape, 1.0 / shape, jobs)
    else:
        raise LoadError("arrivals of a trace are not random")
    moments: NDArray[np.float64] = np.cumsum(gaps) / rate
    return moments


def recorded_arrivals(recorded: NDArray[np.float64], rate: float | None) -> NDArray[np.float64]:
    """Recorded moments, ascending, from 0; stretched or squeezed to `rate` if one is given.

    Raises `LoadError` if there is a rate, but no time passes between the first and the last job.
    """
    moments: NDArray[np.float64] = recorded - recorded[0]
    if rate is None or len(moments) == 1:
        return moments
    check_rate(rate)
    natural = mean_rate(moments)
    if natural is None:
        raise LoadError("all jobs of the trace arrive at the same moment: no rate can be set")
    moments *= natural / rate
    return moments


def mean_rate(moments: NDArray[np.float64]) -> float | None:
    """Jobs per second between the first and the last arrival; None if that is no time at all."""
    span = float(moments[-1] - moments[0])
    return (len(moments) - 1) / span if span > 0 else None


def check_rate(rate: float) -> None:
    """Raises `LoadError` unless `rate` is a number of jobs per second."""
    if not (math.isfinite(rate) and rate > 0):
        raise LoadError(f"the rate must be greater than 0 jobs per second, not {rate:g}")
