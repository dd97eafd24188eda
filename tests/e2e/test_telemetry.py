"""What a run with preemptions leaves in Prometheus and in a receiver of traces.

FASTSERVE_TEST_TRACE=FILE keeps the trace of the preempted request, for
`python -m fastserve.bench.trace_picture`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, TracesData

from support import prometheus
from support.chart import render
from support.chart_promql import expressions
from support.deployment import Deployment, deployment
from support.otlp import Collector, collector
from support.streams import TIMEOUT, Answer, body_of, stream
from support.waiting import eventually

# KV memory for one and a half jobs, and one row: whoever comes later preempts.
SIZES = ("--kv-blocks", "11", "--max-num-seqs", "1", "--host-kv-blocks", "64")
LONG_TOKENS = 130
LONG = "Write a long story about a lighthouse keeper and his daughter.\n\n"
SHORT = "The harbour of the small town had been built for fishing boats. " * 6
TRACE = bytes.fromhex("4bf92f3577b34da6a3ce929d0e0e4736")
PARENT = "00f067aa0ba902b7"
REQUESTS = 12
_REQUESTS = "sum(fastserve_gateway_requests_total)"
_COMPARISON = re.compile(r" (?:<|>|==) [\d.]+")
# What has no value in a run where nothing goes wrong.
ONLY_IN_TROUBLE = (
    "fastserve_kv_failures_total",
    "fastserve_kv_verify_failures_total",
    "fastserve_redis_errors_total",
)


@dataclass
class Run:
    """The deployment after its load, and who watched it."""

    system: Deployment
    receiver: Collector
    watcher: prometheus.Prometheus | None
    long: Answer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("telemetry")
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(collector())
        tracing = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "OTEL_TRACES_SAMPLER_ARG": "1.0",
        }
        system = stack.enter_context(deployment(folder / "up", *SIZES, **tracing))
        watcher = None
        if prometheus.BINARY is not None:
            services = system.state["services"].items()
            targets = {name: service["metrics"] for name, service in services if service["metrics"]}
            rules = _alerts()
            watcher = stack.enter_context(
                prometheus.prometheus(folder / "prometheus", targets, rules)
            )
        yield Run(system, receiver, watcher, asyncio.run(_load(system, watcher)))


async def _load(system: Deployment, watcher: prometheus.Prometheus | None) -> Answer:
    """A long answer, and while it streams four short ones, twice; a request that is wrong.

    Rates want two scrapes with something in between, also of what the first preemption brings.
    """
    long = Answer()
    async with httpx.AsyncClient(base_url=system.url, timeout=TIMEOUT) as client:
        await _scraped(watcher, "up", 4)
        alone = await stream(client, body_of(LONG, LONG_TOKENS), Answer())
        assert alone.finish == "length"
        if watcher is not None:
            await _burst(client, Answer(), {})
            await _scraped(watcher, _REQUESTS, 6)
        await _burst(client, long, {"traceparent": f"00-{TRACE.hex()}-{PARENT}-01"})
        wrong = await client.post("/v1/completions", json={"model": "nobody", "prompt": "x"})
        assert wrong.status_code == 404
        assert long.text == alone.text
        await _scraped(watcher, _REQUESTS, REQUESTS)
    return long


async def _burst(client: httpx.AsyncClient, long: Answer, headers: dict[str, str]) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stream(client, body_of(LONG, LONG_TOKENS), long, headers))
        await long.reached(60)
        for number in range(4):
            tasks.create_task(stream(client, body_of(f"{number}. {SHORT}", 4), Answer()))


async def _scraped(watcher: prometheus.Prometheus | None, expression: str, total: int) -> None:
    if watcher is not None:
        await eventually(lambda: sum(watcher.query(expression)) == total, f"{expression} {total}")


def _alerts() -> list[dict[str, Any]]:
    found = render("everything")
    (manifest,) = (one for one in found if one["kind"] == "PrometheusRule")
    return [rule for group in manifest["spec"]["groups"] for rule in group["rules"]]


def _dashboard() -> list[str]:
    manifests = [one for one in render("everything") if one["kind"] == "ConfigMap"]
    return [expression for expression in expressions(manifests) if "$namespace" in expression]


async def test_the_trace_of_a_preempted_request(run: Run) -> None:
    def spans() -> dict[str, Span]:
        found = run.receiver.of_trace(TRACE).get("fastserve-scheduler", [])
        return {span.name: span for span in found}

    def servers() -> list[Span]:
        return run.receiver.of_trace(TRACE).get("fastserve-gateway", [])

    await eventually(lambda: "fastserve.decode" in spans() and servers(), "the whole trace")
    (server,) = servers()
    assert server.parent_span_id.hex() == PARENT
    queue, prefill, decode = (
        spans()[f"fastserve.{name}"] for name in ("queue", "prefill", "decode")
    )
    # One after the other without a gap (but for rounding), within the request.
    assert server.start_time_unix_nano <= queue.start_time_unix_nano
    assert abs(queue.end_time_unix_nano - prefill.start_time_unix_nano) <= 1_000
    assert abs(prefill.end_time_unix_nano - decode.start_time_unix_nano) <= 1_000
    assert decode.end_time_unix_nano <= server.end_time_unix_nano
    for span in (queue, prefill, decode):
        assert span.parent_span_id == server.span_id
    names = [event.name for event in decode.events]
    assert "preempted" in names and "offloaded" in names, names
    assert "uploaded" in names and "resumed" in names, names
    assert names.index("preempted") < names.index("resumed")
    # A pause lasts as long as the short ones take, and the client saw it.
    paused = next(event for event in decode.events if event.name == "preempted")
    resumed = next(event for event in decode.events if event.name == "resumed")
    assert resumed.time_unix_nano > paused.time_unix_nano
    attributes = {pair.key: pair.value for pair in decode.attributes}
    assert attributes["fastserve.preemptions"].int_value >= 1
    assert attributes["gen_ai.usage.output_tokens"].int_value == LONG_TOKENS
    # Sampled iterations of the worker are part of it.
    iterations = run.receiver.of_trace(TRACE)["fastserve-worker"]
    assert {span.name for span in iterations} == {"fastserve.iteration"}
    assert all(TRACE in {link.trace_id for link in span.links} for span in iterations)
    if target := os.environ.get("FASTSERVE_TEST_TRACE"):
        Path(target).write_bytes(_trace(run.receiver).SerializeToString())


def _trace(receiver: Collector) -> TracesData:
    data = TracesData()
    for service, spans in receiver.of_trace(TRACE).items():
        resource = data.resource_spans.add()
        name = resource.resource.attributes.add()
        name.key, name.value.string_value = "service.name", service
        resource.scope_spans.add().spans.extend(spans)
    return data


needs_prometheus = pytest.mark.skipif(
    prometheus.BINARY is None, reason="prometheus is not installed"
)


def concrete(expression: str) -> str:
    """With Grafana's variables as their defaults are."""
    for name, value in (
        *(("$namespace", ".*"), ("$shard", ".+"), ("$model", ".+")),
        *(("$__rate_interval", "1m"), ("$__interval", "5s")),
    ):
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


@needs_prometheus
async def test_every_panel_of_the_dashboard_has_data(run: Run) -> None:
    watcher = run.watcher
    assert watcher is not None
    wanted = [concrete(one) for one in _dashboard()]
    assert len(wanted) > 50
    quiet = [one for one in wanted if any(name in one for name in ONLY_IN_TROUBLE)]
    missing = [expression for expression in wanted if expression not in quiet]

    def all_there() -> bool:
        missing[:] = [expression for expression in missing if not watcher.query(expression)]
        return not missing

    try:
        await eventually(all_there, "data")
    except AssertionError:
        pytest.fail("no data for " + "\n".join(missing))
    for expression in quiet:
        assert sum(watcher.query(expression)) == 0, expression
    # Numbers that are known.
    assert watcher.query("sum(fastserve_gateway_requests_total)") == [REQUESTS]
    assert sum(watcher.query("sum(fastserve_preemptions_total)")) >= 1
    moved = watcher.query('fastserve_kv_tier_bytes_total{tier="host",direction="out"}')
    assert moved == watcher.query('fastserve_swap_bytes_total{direction="out"}') and moved[0] > 0


@needs_prometheus
async def test_no_alert_fires_in_a_healthy_run(run: Run) -> None:
    watcher = run.watcher
    assert watcher is not None
    await eventually(
        lambda: all(rule["health"] == "ok" for rule in watcher.rules()), "evaluation of all alerts"
    )
    assert len(watcher.rules()) == len(_alerts())
    firing = [rule["name"] for rule in watcher.rules() if rule["state"] == "firing"]
    assert not firing
    # What they compare is there, so that they would notice: without the comparison each has data.
    for rule in _alerts():
        if not any(name in rule["expr"] for name in (*ONLY_IN_TROUBLE, "outcome=")):
            compared = _COMPARISON.sub("", rule["expr"])
            assert compared != rule["expr"]
            assert watcher.query(compared), compared
