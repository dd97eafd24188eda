"""Sweeps: over processes, into a CSV, into plots, and what the seeds say together."""

from __future__ import annotations

import contextlib
import csv
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastserve.bench.arrivals import Arrivals, LoadError
from fastserve.bench.plot import plot
from fastserve.bench.sim.engine import StuckError
from fastserve.bench.sim.hardware import OPT_13B
from fastserve.bench.sim.types import SimOptions
from fastserve.bench.sweep import (
    Estimate,
    Run,
    SimulationError,
    crossing,
    curves,
    estimate,
    execute,
    over_seeds,
    sweep,
    write_csv,
)
from support.waiting import eventually


def a_run(policy: str = "fcfs", rate: float = 2.0, seed: int = 0, **more: Any) -> Run:
    options = SimOptions(policy=policy, hardware=OPT_13B, kv_tokens=60_000)
    return Run("alpaca", Arrivals(), rate, more.pop("jobs", 20), seed, options, **more)


RUNS = [
    a_run(policy, rate, seed)
    for policy in ("fcfs", "mlfq")
    for rate in (8.0, 2.0)
    for seed in (0, 1)
]


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return sweep(RUNS, 1, lambda: None)


def test_worker_processes_give_the_same_reports_in_the_same_order(
    reports: list[dict[str, Any]],
) -> None:
    done: list[None] = []
    assert sweep(RUNS, 2, lambda: done.append(None)) == reports
    assert len(done) == len(RUNS)
    assert [(found["policy"], found["rate"], found["seed"]) for found in reports] == [
        (run.options.policy, run.rate, run.seed) for run in RUNS
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_in_one_run_ends_the_sweep(processes: int) -> None:
    with pytest.raises(LoadError, match="skew"):
        sweep([a_run(), a_run(tenants=2, tenant_skew=-1.0), a_run()], processes, lambda: None)


def test_a_simulation_that_goes_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(*_: object) -> None:
        raise StuckError("3 jobs are left")

    monkeypatch.setattr("fastserve.bench.sweep.simulate", stuck)
    with pytest.raises(SimulationError, match=r"^fcfs at 2 job/s, seed 4: 3 jobs are left$"):
        execute(a_run(seed=4))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_no_worker_process_outlives_a_sweep_that_is_ended(how: signal.Signals) -> None:
    command = [sys.executable, "-m", "fastserve.cli", "simulate", "--jobs", "100000"]
    words = ["--seeds", "2", "--processes", "2", "--rate", "3"]
    process = psutil.Popen([*command, *words], stderr=subprocess.DEVNULL)
    workers: list[psutil.Process] = []
    try:
        await eventually(lambda: len(simulating(process)) == 2, timeout=30)
        workers = simulating(process)
        process.send_signal(how)
        assert process.wait(timeout=20) != 0
        await eventually(lambda: not any(worker.is_running() for worker in workers), timeout=20)
    finally:
        for each in (process, *workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(timeout=20)


def simulating(process: psutil.Process) -> list[psutil.Process]:
    """Its worker processes that are past their start: they have used some processor time."""
    found = []
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            is_worker = any("spawn_main" in word for word in child.cmdline())
            if is_worker and child.cpu_times().user > 1:
                found.append(child)
    return found


def test_progress_of_a_run_ends_with_all_jobs() -> None:
    ended: list[int] = []
    found = execute(a_run(jobs=600), ended.append)
    assert ended[-1] == 600 and ended == sorted(ended)
    assert found["failed"] == 0


def test_the_csv_has_one_row_per_run(tmp_path: Path, reports: list[dict[str, Any]]) -> None:
    write_csv(tmp_path / "runs.csv", RUNS, reports)
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(RUNS)
    assert rows[-1]["policy"] == "mlfq" and rows[-1]["seed"] == "1"
    assert float(rows[-1]["rate"]) == 2.0
    assert float(rows[-1]["per_token_s_p99"]) == reports[-1]["per_token_s"]["p99"]
    assert rows[0]["workload"] == "alpaca" and rows[0]["kv_tokens"] == "60000"


def test_the_plots_are_written_and_the_same_each_time(
    tmp_path: Path, reports: list[dict[str, Any]]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths = plot(reports, tmp_path / name, title="a title", slo=0.3)
        assert [path.name for path in paths] == ["latency.png", "latency.svg"]
    assert (tmp_path / "a/latency.png").read_bytes().startswith(b"\x89PNG")
    for name in ("latency.png", "latency.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "<svg" in (tmp_path / "a/latency.svg").read_text()


def test_a_plot_without_a_figure_is_empty_but_there(tmp_path: Path) -> None:
    nothing = {"mean": None, "p50": None, "p95": None, "p99": None}
    found = {"policy": "fcfs", "rate": 1.0, "per_token_s": nothing}
    for path in plot([found], tmp_path, title="all failed"):
        assert path.stat().st_size > 0


def test_the_interval_of_seeds_is_students_t_of_the_logarithms() -> None:
    assert estimate([0.5]) == Estimate(0.5, 0.5, 0.5)
    found = estimate([1.0, math.e**2])
    assert found.mean == pytest.approx((1 + math.e**2) / 2)
    # Of 0 and 2: middle 1, standard error 1, and t is 12.706 at one degree of freedom.
    assert math.log(found.high) == pytest.approx(1 + 12.706)
    assert math.log(found.low) == pytest.approx(1 - 12.706)


def test_the_interval_goes_over_smoothly_to_many_seeds() -> None:
    def half(seeds: int) -> float:
        found = estimate([1.0, math.e] * (seeds // 2))
        return (math.log(found.high) - math.log(found.low)) / 2

    # t is 2.045 for 29 degrees of freedom, 2.030 for 35, 1.984 for 99; the deviation 0.5.
    for seeds, t in ((30, 2.045), (36, 2.030), (100, 1.984)):
        assert half(seeds) == pytest.approx(t * 0.5 / math.sqrt(seeds - 1), rel=2e-3)


def made(policy: str, rate: float | None, value: float | None) -> dict[str, Any]:
    return {"policy": policy, "rate": rate, "per_token_s": {"mean": value}}


def test_curves_are_means_over_seeds_by_ascending_rate() -> None:
    found = curves(
        [made("a", 2.0, 4.0), made("a", 1.0, 1.0), made("b", 1.0, 7.0), made("a", 1.0, 3.0)],
        "per_token_s",
        "mean",
    )
    assert {name: [(x, y.mean) for x, y in curve.items()] for name, curve in found.items()} == {
        "a": [(1.0, 2.0), (2.0, 4.0)],
        "b": [(1.0, 7.0)],
    }


def test_a_seed_in_which_all_failed_leaves_no_point() -> None:
    group = [made("a", 1.0, 1.0), made("a", 1.0, None), made("a", None, 1.0)]
    assert over_seeds(group[:2], "per_token_s", "mean") is None
    assert curves(group, "per_token_s", "mean") == {}


@pytest.mark.parametrize(
    ("values", "rate"),
    [
        ({1.0: 0.1, 2.0: 0.2, 3.0: 0.6}, 2.25),
        ({1.0: 0.1, 2.0: 0.5, 3.0: 0.2, 4.0: 0.9}, 1.5),
        ({1.0: 0.1, 2.0: 0.3, 3.0: 0.5}, 2.0),
        ({1.0: 0.1, 2.0: 0.2}, None),
        ({1.0: 0.4, 2.0: 0.2, 3.0: 0.9}, None),
    ],
)
def test_a_curve_crosses_where_it_first_rises_above(
    values: dict[float, float], rate: float | None
) -> None:
    curve = {x: Estimate(y, y, y) for x, y in values.items()}
    assert crossing(curve, 0.3) == (rate if rate is None else pytest.approx(rate))
