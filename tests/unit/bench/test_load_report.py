"""What the figures of a run are made of."""

from __future__ import annotations

import json
import math
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.bench.load.report import Slo, latencies, report, warnings
from fastserve.bench.load.types import ClientHealth, LoadRequest, Outcome, RunResult

HEALTHY = ClientHealth(0.0, 0.0, 0.0, 0.0, 0.1)
NO_SLO = Slo()


def outcome(
    due: float = 0.0, first: float = 1.0, end: float = 3.0, tokens: int = 5, **fields: Any
) -> Outcome:
    request = LoadRequest(due, "a b", fields.pop("asked_prompt", 3), fields.pop("asked", tokens))
    known = {"prompt_tokens": 3, "completion_tokens": tokens, "last": end, "sent": due}
    return Outcome(request, due, first=first, end=end, **{**known, **fields})


def failure(due: float = 0.0, end: float = 0.1, **fields: Any) -> Outcome:
    request = LoadRequest(due, "a b", 3, 5)
    return Outcome(request, due, due, end=end, **{"error": "HTTP 429: full", **fields})


def reported(*outcomes: Outcome, slo: Slo = NO_SLO, **fields: Any) -> dict[str, Any]:
    result = RunResult(
        list(outcomes), fields.pop("unfinished", 0), fields.pop("not_sent", 0), HEALTHY
    )
    return report(result, slo, **{"ignore_eos": False, "cut_to_length": 0, **fields})


def test_latencies_count_from_the_moment_a_request_was_due() -> None:
    found = latencies([outcome(due=2.0, sent=2.5, first=3.0, end=7.0, last=6.5, tokens=8)])
    assert found["ttft_s"].tolist() == [1.0]
    assert found["e2e_s"].tolist() == [5.0]
    assert found["per_token_s"].tolist() == [5.0 / 8]
    assert found["tpot_s"].tolist() == [3.5 / 7]


def test_one_token_has_no_time_per_output_token() -> None:
    assert math.isnan(latencies([outcome(tokens=1)])["tpot_s"][0])
    found = reported(outcome(tokens=1), slo=Slo(tpot_s=0.1))
    assert found["tpot_s"]["mean"] is None and found["slo_attainment"] == 1.0


def test_a_failure_counts_with_the_worst_latency_of_the_others() -> None:
    found = latencies([outcome(), outcome(first=2.0, end=9.0, tokens=2), failure()])
    assert found["ttft_s"][2] == 2.0 and found["e2e_s"][2] == 9.0
    assert found["tpot_s"][2] == 7.0 and found["per_token_s"][2] == 4.5


def test_a_failure_that_took_longer_counts_with_its_own_time() -> None:
    found = latencies([outcome(), failure(end=60.0)])
    assert found["ttft_s"][1] == 60.0 and found["e2e_s"][1] == 60.0


SECONDS = st.floats(0.001, 100)


@given(
    st.lists(st.tuples(SECONDS, SECONDS, st.integers(1, 50)), min_size=2, max_size=20),
    st.data(),
)
def test_failing_never_makes_a_figure_better(
    rows: list[tuple[float, float, int]], data: st.DataObject
) -> None:
    good = [outcome(first=a, end=a + b, tokens=n) for a, b, n in rows]
    at = data.draw(st.integers(0, len(good) - 1))
    # The one that fails is not the slowest in any respect, so that nothing hides behind it.
    quick = outcome(first=0.0005, end=0.001, tokens=50)
    before = reported(*good[:at], quick, *good[at + 1 :])
    after = reported(*good[:at], failure(end=0.0001), *good[at + 1 :])
    for metric in ("ttft_s", "e2e_s", "per_token_s"):
        for statistic in ("mean", "p50", "p95", "p99"):
            assert after[metric][statistic] >= before[metric][statistic] * (1 - 1e-9)


def test_no_figure_if_all_failed() -> None:
    found = reported(failure(), failure())
    assert found["failed"] == 2 and found["ttft_s"]["mean"] is None
    assert found["errors"] == {"HTTP 429: full": 2}
    assert found["output_tokens_per_s"] == 0.0
    json.dumps(found, allow_nan=False)


def test_throughput_is_of_complete_answers_over_the_whole_time() -> None:
    found = reported(outcome(due=1.0, first=2.0, end=3.0), outcome(due=2.0, end=6.0), failure(1.5))
    assert found["makespan_s"] == 5.0
    assert found["output_tokens_per_s"] == 2.0
    assert found["requests_per_s"] == pytest.approx(0.4)


def test_goodput_needs_every_limit_and_failures_miss_them() -> None:
    slow_start = outcome(first=2.5)
    slow_tokens = outcome(first=0.5, end=9.0)
    # In the end a failure may have the figures of a good answer: it is none.
    failed = outcome(error="the stream ended without an end")
    found = reported(outcome(), slow_start, slow_tokens, failed, slo=Slo(2.0, 1.0))
    assert found["slo_attainment"] == 0.25
    assert found["goodput_per_s"] == pytest.approx(1 / 9.0)
    assert reported(outcome())["goodput_per_s"] is None


def test_gaps_between_tokens_are_pooled() -> None:
    found = reported(
        outcome(gaps=array("d", [0.1, 0.3])),
        outcome(gaps=array("d", [0.2])),
        outcome(gaps=array("d", [9.0]), error="broken"),
    )
    assert found["itl_s"]["mean"] == pytest.approx(0.2) and found["itl_s"]["p50"] == 0.2


def test_lengths_are_checked_against_what_was_asked() -> None:
    found = reported(
        outcome(asked=6), outcome(asked=4), outcome(prompt_tokens=4), outcome(asked_prompt=None)
    )
    assert (found["shorter_than_asked"], found["longer_than_asked"]) == (1, 1)
    assert (found["made_prompts"], found["exact_prompts"]) == (3, 2)
    said = " / ".join(warnings(found))
    assert "1 answers are longer" in said and "1 of 3 prompts" in said and "shorter" not in said
    assert "shorter" in " / ".join(warnings({**found, "ignore_eos": True}))


def test_without_usage_events_are_counted_and_it_is_said() -> None:
    found = reported(outcome(completion_tokens=None, prompt_tokens=None, events=7))
    assert found["output_tokens"] == 7 and found["without_usage"] == 1
    assert any("counted by events" in said for said in warnings(found))


def test_a_client_that_is_late_or_busy_says_so() -> None:
    healthy = reported(outcome(first=0.2))
    assert warnings(healthy) == []
    late = {**healthy, "client": {**healthy["client"], "late_p99_s": 0.02}}
    stalled = {**healthy, "client": {**healthy["client"], "stall_p99_s": 0.02}}
    busy = {**healthy, "client": {**healthy["client"], "cpu": 0.97}}
    for found, word in ((late, "left late"), (stalled, "stalled"), (busy, "bottleneck")):
        assert [word in said for said in warnings(found)] == [True]


def test_an_interrupted_run_says_what_is_missing() -> None:
    said = warnings(reported(outcome(), unfinished=3, not_sent=7))
    assert len(said) == 1 and "3" in said[0] and "7" in said[0]
