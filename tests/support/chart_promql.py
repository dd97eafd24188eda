"""What the chart asks of Prometheus, and whether the services have it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from support import services
from support.chart import Manifest

# Added by Prometheus when it scrapes.
_SCRAPED = {"namespace", "pod", "job", "instance", "service", "endpoint", "container", "le"}
_SERIES = re.compile(r"((?:fastserve_|vllm:)\w+)\s*(\{[^}]*\})?")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_GROUPED = re.compile(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)")


def wrong_series(text: str) -> list[str]:
    """Metrics in PromQL exist, with the labels that are asked for. `text`: one expression."""
    known = services.metrics()
    wrong, labels = [], set()
    for name, selector in _SERIES.findall(text):
        if name not in known:
            wrong.append(f"no metric {name}")
            continue
        labels |= known[name]
        asked = set(_LABEL.findall(selector)) - _SCRAPED
        # An absent label may be asked for as absent.
        absent = {label for label in asked if f'{label}=""' in selector}
        wrong += [f"{name} has no label {label}" for label in asked - known[name] - absent]
    for group in _GROUPED.findall(text):
        asked = {label.strip() for label in group.split(",") if label.strip()}
        wrong += [f"nothing has the label {label}" for label in asked - labels - _SCRAPED]
    return wrong


def expressions(manifests: list[Manifest]) -> Iterator[str]:
    """All PromQL: alerts, dashboards, autoscalers."""
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "PrometheusRule":
            for group in spec["groups"]:
                yield from (rule["expr"] for rule in group["rules"])
        elif manifest["kind"] == "ScaledObject":
            yield from (trigger["metadata"]["query"] for trigger in spec["triggers"])
        elif manifest["kind"] == "HorizontalPodAutoscaler":
            for metric in spec["metrics"]:
                if metric["type"] == "External":
                    wanted = metric["external"]["metric"]
                    labels = ",".join(
                        f'{k}="{v}"' for k, v in wanted["selector"]["matchLabels"].items()
                    )
                    yield f"{wanted['name']}{{{labels}}}"
        elif manifest["kind"] == "ConfigMap":
            for name, text in manifest["data"].items():
                if name.endswith(".json"):
                    yield from _of_dashboard(json.loads(text))
                elif "seriesQuery" in text:
                    yield from re.findall(r"seriesQuery: (.*)", text)


def _of_dashboard(dashboard: Any) -> Iterator[str]:
    if isinstance(dashboard, dict):
        for key, value in dashboard.items():
            if key in ("expr", "definition") and isinstance(value, str):
                series = re.fullmatch(r"label_values\((.*), \w+\)", value)
                yield (series[1] if series else value).replace("$__rate_interval", "5m")
            else:
                yield from _of_dashboard(value)
    elif isinstance(dashboard, list):
        for value in dashboard:
            yield from _of_dashboard(value)
