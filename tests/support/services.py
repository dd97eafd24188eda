"""What the services know by themselves, read from their code: settings, metrics, routes."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import opentelemetry.sdk.environment_variables as otel
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from fastserve.common.rpc import LIVE
from fastserve.common.settings import ServiceSettings
from fastserve.gateway.metrics import Metrics as GatewayMetrics
from fastserve.gateway.routes import status
from fastserve.gateway.settings import GatewaySettings
from fastserve.kv_offload.metrics import Metrics as KvMetrics
from fastserve.kv_offload.settings import Settings as KvSettings
from fastserve.scheduler.metrics import Metrics as SchedulerMetrics
from fastserve.scheduler.service import ROLE_KNOWN
from fastserve.scheduler.settings import SchedulerSettings
from fastserve.worker.metrics import Metrics as WorkerMetrics
from fastserve.worker.settings import Settings as WorkerSettings

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "worker": WorkerSettings,
    "kv_offload": KvSettings,
}
HEALTH_NAMES = {"", LIVE, ROLE_KNOWN}
_PREFIX = "FASTSERVE_"
_LIBRARIES = re.compile(r"OTEL_|HF_")


def settings_variables(service: str) -> set[str]:
    """Environment variables that are settings of a service."""
    return {f"{_PREFIX}{name.upper()}" for name in SETTINGS[service].model_fields}


@cache
def library_variables() -> set[str]:
    """What OpenTelemetry, huggingface_hub and our own code read besides settings."""
    import huggingface_hub.constants as hub

    read = {value for value in vars(otel).values() if isinstance(value, str)}
    files = [Path(hub.__file__), *ROOT.glob("services/*/src/**/*.py")]
    for source in (file.read_text() for file in files):
        if not (_LIBRARIES.search(source) or _PREFIX in source):
            continue  # parsing them all takes seconds
        for node in ast.walk(ast.parse(source)):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and (_LIBRARIES.match(text) or text.startswith(_PREFIX)):
                read.add(text)
    return read


def http_paths() -> set[str]:
    """Paths that need no key: probes and metrics."""
    return {str(getattr(route, "path", "")) for route in status.router.routes}


@cache
def metrics() -> dict[str, set[str]]:
    """Series as Prometheus names them -> labels, of all services together."""
    known: dict[str, set[str]] = {}
    for _, registry, extra in _registries():
        for collector in list(registry._collector_to_names):
            assert isinstance(collector, MetricWrapperBase), collector
            labels = {*collector._labelnames, *extra}
            for name in _series(collector):
                known[name] = known.get(name, set()) | labels
    return known


def metrics_table(service: str) -> list[str]:
    """Lines of a Markdown table: name, kind, labels, meaning."""
    lines = ["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |"]
    for name, registry, _ in _registries():
        for collector in registry._collector_to_names if name == service else ():
            assert isinstance(collector, MetricWrapperBase), collector
            series = _series(collector)[0].removesuffix("_bucket")
            labels = ", ".join(collector._labelnames)
            words = (series, collector._type, labels, collector._documentation.replace("|", "\\|"))
            lines.append("| `{}` | {} | {} | {} |".format(*words))
    return lines


def _registries() -> Iterator[tuple[str, CollectorRegistry, tuple[str, ...]]]:
    """Service, its metrics, and the labels that are added to all of them."""
    gateway = CollectorRegistry()
    GatewayMetrics(gateway)
    yield "gateway", gateway, ()
    scheduler = CollectorRegistry()
    SchedulerMetrics(scheduler)
    yield "scheduler", scheduler, ("shard",)  # `NamesShard` adds it
    yield "worker", WorkerMetrics("m", 16, 1).registry, ()
    sidecar = KvMetrics()
    sidecar.watch(list)
    yield "kv-offload", sidecar.registry, ()


def _series(collector: MetricWrapperBase) -> list[str]:
    name = collector._name
    kinds: dict[str, Callable[[], list[str]]] = {
        "counter": lambda: [f"{name}_total"],
        "histogram": lambda: [f"{name}_bucket", f"{name}_sum", f"{name}_count"],
        "gauge": lambda: [name],
    }
    return kinds[str(collector._type)]()
