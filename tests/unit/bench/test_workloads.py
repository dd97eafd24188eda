"""Lengths and arrivals: as in the traces they come from, and the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from fastserve.bench.arrivals import Arrivals, LoadError, mean_rate
from fastserve.bench.sim.types import SimJob
from fastserve.bench.workloads import WORKLOADS, Trace, generate
from fastserve.bench.workloads.fit import fit
from fastserve.bench.workloads.fit import main as fit_main
from fastserve.bench.workloads.tables import draw, tables

_JOBS = 100_000
POISSON = Arrivals()


class Shape(NamedTuple):
    """Mean, median, P95 and P99 in tokens."""

    mean: float
    p50: float
    p95: float
    p99: float


# Of the traces that the tables come from.
PROMPTS = {
    "sharegpt": Shape(109.2, 30, 566, 906),
    "alpaca": Shape(18.49, 15, 38, 69),
    "azure-conv": Shape(1237, 1035, 4086, 4122),
    "azure-code": Shape(2041, 1454, 7325, 7436),
}
OUTPUTS = {
    "sharegpt": Shape(319.5, 282, 822, 984),
    "alpaca": Shape(57.8, 42, 153, 262),
    "azure-conv": Shape(221.9, 141, 463, 612),
    "azure-code": Shape(27.5, 13, 85, 248),
}


def lengths(workload: str, jobs: int = _JOBS) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    made = generate(workload, jobs, 7, POISSON, 1.0)
    return (
        np.array([job.prompt_tokens for job in made]),
        np.array([job.output_tokens for job in made]),
    )


@pytest.mark.parametrize("workload", PROMPTS)
def test_a_workload_has_the_lengths_of_its_trace(workload: str) -> None:
    for drawn, real in zip(lengths(workload), (PROMPTS[workload], OUTPUTS[workload]), strict=True):
        assert drawn.min() >= 1
        assert drawn.mean() == pytest.approx(real.mean, rel=0.03)
        found = np.percentile(drawn, (50, 95, 99))
        assert found == pytest.approx(real[1:], rel=0.06, abs=1)


def test_outputs_hang_on_prompts_as_in_the_traces() -> None:
    prompts, outputs = lengths("azure-conv")
    assert outputs[(prompts > 900) & (prompts < 1190)].mean() == pytest.approx(403, rel=0.03)
    assert outputs[prompts > 2700].mean() == pytest.approx(68, rel=0.05)
    prompts, outputs = lengths("sharegpt")
    assert outputs[prompts < 10].mean() < 0.65 * outputs[prompts > 100].mean()
    prompts, outputs = lengths("alpaca")
    assert outputs[prompts > 25].mean() < 0.65 * outputs[prompts < 13].mean()


def test_longtail_is_alpaca_with_a_few_long_prompts() -> None:
    prompts, outputs = lengths("longtail")
    long = prompts > 1000
    assert long.mean() == pytest.approx(0.05, abs=0.003)
    assert prompts[long].min() >= 4000 and prompts[long].max() <= 16_000
    assert np.median(prompts[long]) == pytest.approx(8000, rel=0.03)
    assert prompts[~long].mean() == pytest.approx(PROMPTS["alpaca"].mean, rel=0.03)
    assert outputs[long].mean() == pytest.approx(OUTPUTS["alpaca"].mean, rel=0.05)


def test_a_mixture_takes_equal_shares_of_its_parts() -> None:
    prompts, outputs = lengths("azure-code + alpaca")
    means = [(PROMPTS[name].mean, OUTPUTS[name].mean) for name in ("azure-code", "alpaca")]
    assert prompts.mean() == pytest.approx(sum(mean for mean, _ in means) / 2, rel=0.03)
    assert outputs.mean() == pytest.approx(sum(mean for _, mean in means) / 2, rel=0.03)
    # Mixed one by one, not one part after the other.
    assert abs((prompts[:1000] > 200).mean() - (prompts[-1000:] > 200).mean()) < 0.1


@pytest.mark.parametrize("workload", [*WORKLOADS, "azure-code+alpaca"])
def test_a_seed_gives_the_same_jobs_and_another_seed_others(workload: str) -> None:
    first = generate(workload, 200, 3, POISSON, 2.0, tenants=3)
    assert generate(workload, 200, 3, POISSON, 2.0, tenants=3) == first
    assert generate(workload, 200, 4, POISSON, 2.0, tenants=3) != first


def test_another_rate_changes_nothing_but_the_scale_of_arrivals() -> None:
    slow = generate("sharegpt", 100, 0, POISSON, 1.0)
    fast = generate("sharegpt", 100, 0, POISSON, 4.0)
    assert [job[1:] for job in slow] == [job[1:] for job in fast]
    assert [job.arrival_s for job in slow] == pytest.approx([4 * job.arrival_s for job in fast])


def test_an_unknown_workload_names_those_that_exist() -> None:
    with pytest.raises(LoadError, match=r"'lmsys' is unknown: choose one of sharegpt, .*longtail"):
        generate("alpaca+lmsys", 1, 0, POISSON, 1.0)


def gaps(jobs: list[SimJob]) -> NDArray[np.float64]:
    return np.diff([0.0, *(job.arrival_s for job in jobs)])


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [(POISSON, 1.0), (Arrivals("gamma", 3.0), 3.0), (Arrivals("gamma", 0.2), 0.2)],
)
def test_arrivals_have_the_rate_and_the_cv_asked_for(arrivals: Arrivals, cv: float) -> None:
    between = gaps(generate("alpaca", _JOBS, 1, arrivals, 2.5))
    assert (between >= 0).all()
    assert between.mean() == pytest.approx(1 / 2.5, rel=0.03)
    assert between.std() / between.mean() == pytest.approx(cv, rel=0.03)


TRACE = Trace("t.csv", np.array([5.0, 6.0, 9.0]), np.array([10, 20, 30]), np.array([1, 2, 3]))


def test_jobs_of_a_trace_come_as_recorded_from_zero() -> None:
    jobs = generate(TRACE, 3, 0, Arrivals("trace"), None)
    assert [job[:3] for job in jobs] == [(0.0, 10, 1), (1.0, 20, 2), (4.0, 30, 3)]


def test_the_arrivals_of_a_trace_are_stretched_to_a_rate() -> None:
    jobs = generate(TRACE, 3, 0, Arrivals("trace"), 0.25)
    assert [job.arrival_s for job in jobs] == pytest.approx([0.0, 2.0, 8.0])
    assert mean_rate(np.array([job.arrival_s for job in jobs])) == pytest.approx(0.25)


def test_other_arrivals_draw_whole_rows_of_the_trace_with_the_seed() -> None:
    jobs = generate(TRACE, 3000, 0, POISSON, 1.0)
    rows = {(job.prompt_tokens, job.output_tokens) for job in jobs}
    assert rows == {(10, 1), (20, 2), (30, 3)}
    assert generate(TRACE, 3000, 0, POISSON, 1.0) == jobs
    assert np.mean([job.prompt_tokens for job in jobs]) == pytest.approx(20, rel=0.05)


def test_a_trace_cannot_give_more_arrivals_than_it_has() -> None:
    with pytest.raises(LoadError, match=r"t\.csv has 3 jobs, not 4"):
        generate(TRACE, 4, 0, Arrivals("trace"), None)


def test_jobs_that_all_arrive_at_once_have_no_rate() -> None:
    at_once = Trace("t.csv", np.zeros(2), np.array([1, 1]), np.array([1, 1]))
    assert [job.arrival_s for job in generate(at_once, 2, 0, Arrivals("trace"), None)] == [0, 0]
    with pytest.raises(LoadError, match="no rate can be set"):
        generate(at_once, 2, 0, Arrivals("trace"), 1.0)


def test_only_a_trace_has_arrivals_of_its_own() -> None:
    with pytest.raises(LoadError, match="only a trace"):
        generate("alpaca", 2, 0, Arrivals("trace"), 1.0)


@pytest.mark.parametrize(
    ("skew", "shares"), [(0.0, (1 / 3, 1 / 3, 1 / 3)), (1.0, (6 / 11, 3 / 11, 2 / 11))]
)
def test_tenants_share_the_jobs_as_the_skew_says(skew: float, shares: tuple[float, ...]) -> None:
    jobs = generate("alpaca", 20_000, 0, POISSON, 1.0, tenants=3, tenant_skew=skew)
    names = [job.tenant for job in jobs]
    for number, share in enumerate(shares, 1):
        assert names.count(f"tenant-{number}") / len(jobs) == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize(
    ("jobs", "rate", "tenants", "skew", "message"),
    [
        (0, 1.0, 1, 0.0, "at least 1 job"),
        (1, 0.0, 1, 0.0, "rate must be greater than 0"),
        (1, float("inf"), 1, 0.0, "rate must be greater than 0"),
        (1, None, 1, 0.0, "need a rate"),
        (1, 1.0, 0, 0.0, "at least 1 tenant"),
        (1, 1.0, 2, -1.0, "skew of tenants"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    jobs: int, rate: float | None, tenants: int, skew: float, message: str
) -> None:
    with pytest.raises(LoadError, match=message):
        generate("alpaca", jobs, 0, POISSON, rate, tenants=tenants, tenant_skew=skew)


def test_a_table_keeps_the_lengths_of_its_trace_and_how_they_hang_together() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.geometric(0.01, 5000)
    outputs = prompts * 2 + rng.integers(1, 50, 5000)
    drawn = draw(fit(Trace("t.csv", None, prompts, outputs)), 20_000, rng)
    assert drawn[0].mean() == pytest.approx(prompts.mean(), rel=0.03)
    assert drawn[1].mean() == pytest.approx(outputs.mean(), rel=0.03)
    assert np.corrcoef(*drawn)[0, 1] > 0.9


def test_the_command_that_makes_tables_prints_what_the_package_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f"{prompt},{3 * prompt}\n" for prompt in range(1, 500))
    trace = tmp_path / "t.csv"
    trace.write_text("prompt_tokens,output_tokens\n" + rows)
    assert fit_main([f"mine={trace}"]) == 0
    (tmp_path / "tables.json").write_text(capsys.readouterr().out)
    monkeypatch.setattr("fastserve.bench.workloads.tables.resources.files", lambda _: tmp_path)
    table = tables.__wrapped__()["mine"]
    assert table.jobs == 499 and table.prompts[50] == 250
    assert table.outputs[0][0] == 3 and table.outputs[-1][-1] == 3 * 499
