"""What autoscalers and dashboards read of a scheduler."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from fastserve.scheduler.core import CostModel, CostSample
from fastserve.scheduler.metrics import Metrics


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def cost() -> CostModel:
    return CostModel(
        CostSample(new_tokens=64, context_tokens=64, rows=1, seconds=0.1),
        CostSample(new_tokens=4, context_tokens=64, rows=4, seconds=0.01),
    )


def test_queued_work_is_told_per_connected_worker(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry)
    metrics.set_costs({"a": cost(), "b": cost()}, {"a": 1.5, "b": 0.0})
    name = "fastserve_queued_work_seconds"
    assert registry.get_sample_value(name, {"worker": "a"}) == 1.5
    assert registry.get_sample_value(name, {"worker": "b"}) == 0.0
    metrics.set_costs({"b": cost()}, {"b": 2.0})
    assert registry.get_sample_value(name, {"worker": "a"}) is None, "it has gone"
    assert registry.get_sample_value(name, {"worker": "b"}) == 2.0


def test_who_leads_no_more_tells_nothing_of_queues(registry: CollectorRegistry) -> None:
    """Sums over all schedulers of a shard would count what the new leader counts as well."""
    metrics = Metrics(registry)
    metrics.leader.set(1)
    metrics.workers.set(2)
    metrics.preemptions.labels("quantum", "swap").inc()
    metrics.set_costs({"a": cost()}, {"a": 1.5})
    metrics.set_depths("m", [3, 1], 2)
    metrics.step_down()
    gone = {
        "fastserve_queued_work_seconds": {"worker": "a"},
        "fastserve_predicted_decode_seconds": {"worker": "a"},
        "fastserve_queue_depth": {"level": "0"},
        "vllm:num_requests_running": {"model_name": "m", "engine": "0"},
        "vllm:num_requests_waiting": {"model_name": "m", "engine": "0"},
    }
    for name, labels in gone.items():
        assert registry.get_sample_value(name, labels) is None, name
    for name in ("fastserve_leader", "fastserve_workers_connected"):
        assert registry.get_sample_value(name) == 0
    labels = {"reason": "quantum", "mode": "swap"}
    assert registry.get_sample_value("fastserve_preemptions_total", labels) == 1, "counters stay"
