"""Alerts, dashboards and autoscalers ask for metrics that the services have (kthena PR #868)."""

from __future__ import annotations

import pytest

from support.chart import CASES, render
from support.chart_promql import expressions, wrong_series
from support.services import metrics


def test_alerts_dashboards_and_autoscalers_use_metrics_that_exist() -> None:
    count = 0
    for case in CASES:
        for expression in expressions(render(case)):
            count += 1
            assert wrong_series(expression) == [], expression
    assert count > 60


@pytest.mark.parametrize(
    "expression",
    [
        "rate(fastserve_preemption_total[5m])",
        "fastserve_preemptions",  # which Prometheus calls fastserve_preemptions_total
        'sum(fastserve_queue_depth{stage="1"})',
        "sum by (lever) (fastserve_queue_depth)",
        "vllm:time_to_first_token_seconds",  # a histogram has no series of its own name
        'fastserve_queued_work_seconds{worker="a", sard="b"}',
    ],
)
def test_a_metric_that_does_not_exist_is_noticed(expression: str) -> None:
    assert wrong_series(expression) != []


def test_autoscalers_ask_for_the_queued_work_of_their_model() -> None:
    for case in ("keda", "prometheus-adapter"):
        found = [e for e in expressions(render(case)) if "queued" in e and "smollm2" in e]
        assert len(found) == 1 and 'shard="smollm2"' in found[0]
    assert {"worker", "shard"} <= metrics()["fastserve_queued_work_seconds"]
