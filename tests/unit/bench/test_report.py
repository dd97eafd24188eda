"""The arithmetic of reports, on results made by hand."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fastserve.bench.report import (
    jain_index,
    latencies,
    lightest_tenant,
    report,
    seconds,
    service_jain_index,
    summary,
    table,
)
from fastserve.bench.sim.types import SimResult

_NAN = float("nan")


def result(
    *jobs: tuple[float, int, int, float, float], tenants: Sequence[str] | None = None, **more: Any
) -> SimResult:
    """Of (arrival, prompt, output, first token, end) per job; nan for the last two: failed."""
    arrival, prompt, output, first, end = zip(*jobs, strict=True)
    ends = np.array(end)
    done = ends[~np.isnan(ends)]
    counts: dict[str, Any] = {
        "preemptions": 0, "offloaded_tokens": 0, "uploaded_tokens": 0, "recomputed_tokens": 0,
        "kv_wait_s": 0.0, "row_s": 0.0, "migrations": 0,
    }  # fmt: skip
    return SimResult(
        arrival_s=np.array(arrival),
        prompt_tokens=np.array(prompt),
        output_tokens=np.array(output),
        first_token_s=np.array(first),
        end_s=ends,
        service_s=np.zeros(len(jobs)),
        served_s=np.zeros(len(jobs)),
        tenants=list(tenants or ["default"] * len(jobs)),
        failed=len(ends) - len(done),
        makespan_s=float(done.max() - min(arrival)) if len(done) else 0.0,
        **(counts | more),
    )


def reported(found: SimResult, **more: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "policy": "fcfs",
        "rate": 2.0,
        "seed": 5,
        "kv_bytes_per_token": 100,
    } | more
    return report(found, **options)


TWO_JOBS = result((1.0, 10, 5, 2.0, 6.0), (2.0, 500, 1, 5.0, 5.0))


def test_waiting_for_kv_is_a_share_of_execution() -> None:
    found = reported(result((0.0, 10, 5, 1.0, 6.0), kv_wait_s=0.5, row_s=5.0))
    assert (found["kv_wait_s"], found["kv_wait_share"]) == (0.5, 0.1)
    assert reported(TWO_JOBS)["kv_wait_share"] == 0.0  # nothing ran


def test_each_latency_is_what_its_name_says() -> None:
    found = latencies(TWO_JOBS)
    assert found["e2e_s"].tolist() == [5.0, 3.0]
    assert found["per_token_s"].tolist() == [1.0, 3.0]
    assert found["ttft_s"].tolist() == [1.0, 3.0]
    assert found["tpot_s"][0] == 1.0 and np.isnan(found["tpot_s"][1])


def test_percentiles_lie_between_jobs_linearly() -> None:
    found = summary(np.arange(101.0))
    assert found == {"mean": 50.0, "p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert summary(np.array([1.0, _NAN, 2.0]))["p50"] == 1.5


def test_the_report_has_the_keys_of_its_contract() -> None:
    found = reported(TWO_JOBS, policy="mlfq")
    contract = [
        "policy", "rate", "jobs", "seed", "per_token_s", "ttft_s", "tpot_s", "e2e_s",
        "output_tokens_per_s", "preemptions", "offloaded_tokens", "uploaded_tokens", "makespan_s",
        "failed",
    ]  # fmt: skip
    assert list(found)[: len(contract)] == contract
    for name in ("per_token_s", "ttft_s", "tpot_s", "e2e_s"):
        assert list(found[name]) == ["mean", "p50", "p95", "p99"]
    assert (found["policy"], found["rate"], found["jobs"], found["seed"]) == ("mlfq", 2.0, 2, 5)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_counts_and_throughput_are_those_of_the_result() -> None:
    made = result(
        (1.0, 10, 5, 2.0, 6.0), (2.0, 20, 3, 3.0, 5.0),
        preemptions=7, offloaded_tokens=30, uploaded_tokens=20, recomputed_tokens=4,
    )  # fmt: skip
    found = reported(made)
    assert found["makespan_s"] == 5.0
    assert found["output_tokens_per_s"] == pytest.approx(8 / 5)
    assert (found["preemptions"], found["offloaded_tokens"]) == (7, 30)
    assert (found["uploaded_tokens"], found["recomputed_tokens"]) == (20, 4)
    assert found["moved_bytes"] == 50 * 100
    assert (found["mean_prompt_tokens"], found["mean_output_tokens"]) == (15, 4)


def test_short_prompts_have_a_ttft_of_their_own() -> None:
    made = result((0.0, 256, 2, 1.0, 2.0), (0.0, 257, 2, 9.0, 10.0))
    assert reported(made)["ttft_short_s"]["p95"] == 1.0
    assert reported(made)["ttft_s"]["mean"] == 5.0


def test_a_failed_job_counts_with_the_worst_latency_of_the_run() -> None:
    good = ((0.0, 10, 2, 1.0, 2.0), (0.0, 10, 2, 3.0, 6.0))
    with_failure = reported(result(*good, (5.0, 10, 2, _NAN, _NAN)))
    without = reported(result(*good))
    assert with_failure["failed"] == 1 and with_failure["jobs"] == 3
    for name in ("per_token_s", "ttft_s", "tpot_s", "e2e_s"):
        for statistic, value in without[name].items():
            assert with_failure[name][statistic] >= value
    assert with_failure["e2e_s"]["mean"] == pytest.approx((2 + 6 + 6) / 3)
    assert with_failure["output_tokens_per_s"] == without["output_tokens_per_s"]


def test_a_run_in_which_all_failed_has_no_latency_and_no_throughput() -> None:
    found = reported(result((0.0, 10, 2, _NAN, _NAN)))
    assert found["per_token_s"] == {"mean": None, "p50": None, "p95": None, "p99": None}
    assert found["output_tokens_per_s"] == 0 and found["jain_index"] is None
    json.dumps(found, allow_nan=False)


def test_jains_index_is_one_for_equal_tenants_and_one_nth_for_one_that_waits() -> None:
    assert jain_index(np.array([2.0, 1.0, 3.0, 2.0]), ["a", "b", "b", "a"]) == pytest.approx(1.0)
    one_waits = jain_index(np.array([1e-9, 1e-9, 1e-9, 5.0]), ["a", "b", "c", "d"])
    assert one_waits == pytest.approx(0.25)
    assert jain_index(np.array([1.0, 3.0]), ["a", "b"]) == pytest.approx(16 / 20)
    # A tenant counts once, however many jobs it has, and jobs without a latency do not count.
    assert jain_index(np.array([1.0, 1.0, 3.0]), ["a", "a", "b"]) == pytest.approx(16 / 20)
    assert jain_index(np.array([1.0, _NAN, 3.0]), ["a", "c", "b"]) == pytest.approx(16 / 20)


def test_jains_index_of_service_goes_by_what_was_due() -> None:
    def index(*jobs: tuple[str, int, int]) -> float | None:
        """(tenant, seconds of service in all, seconds when the last one came) per job."""
        made = result(*[(0.0, 1, 1, 1.0, 2.0)] * len(jobs), tenants=[job[0] for job in jobs])
        service, served = (np.array([job[at] for job in jobs], np.float64) for at in (1, 2))
        return service_jain_index(dataclasses.replace(made, service_s=service, served_s=served))

    assert index(("a", 100, 60), ("b", 100, 40), ("b", 100, 20)) == pytest.approx(1.0)
    assert index(("a", 100, 50), ("b", 100, 0)) == pytest.approx(0.5)
    assert index(("a", 300, 75), ("b", 100, 25)) == pytest.approx(0.8)  # 50 were due to each
    assert index(("a", 360, 90), ("b", 10, 10)) == pytest.approx(1.0)  # it asked for no more
    assert index(("a", 100, 0), ("b", 100, 0)) is None


def test_the_lightest_tenant_has_a_ttft_of_its_own() -> None:
    assert lightest_tenant(["a", "b", "a", "c", "c"]) == "b"
    assert lightest_tenant(["b", "a"]) == "b"
    made = result(
        (0.0, 9, 2, 1.0, 2.0), (0.0, 9, 2, 7.0, 8.0), (0.0, 9, 2, 1.0, 3.0), tenants=["a", "b", "a"]
    )
    assert reported(made)["ttft_light_s"]["p95"] == 7.0


def test_the_table_says_what_the_report_says() -> None:
    made = result(
        (0.0, 10, 2, 1.0, 2.0), (0.0, 900, 2, 3.0, 6.0), (0.0, 9, 2, _NAN, _NAN),
        tenants=["a", "b", "a"], preemptions=1234,
    )  # fmt: skip
    shown = io.StringIO()
    Console(width=100, file=shown).print(table(reported(made)))
    text = shown.getvalue()
    for words in (
        "fcfs at 2 job/s, 3 jobs, seed 5", "per-token latency", "prompts up to 256 tokens",
        "1,234", "over 2 tenants", "failed", "counted with the worst",
    ):  # fmt: skip
        assert words in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0123456, "0.0123"), (1.0, "1.00"), (99.94, "99.9"), (99.96, "100"),
     (1234.5, "1234")],
)  # fmt: skip
def test_seconds_are_shown_with_three_digits(value: float | None, text: str) -> None:
    assert seconds(value) == text
