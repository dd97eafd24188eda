"""`python -m fastserve.bench.trace_picture TRACE PNG`: a trace as a timeline, like Jaeger's.

TRACE is an OTLP `TracesData` message in protobuf, as
`FASTSERVE_TEST_TRACE=TRACE pytest tests/e2e/test_telemetry.py` writes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.figure import Figure
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from fastserve.bench.load.plot import COLOURS

# Marks of events that say where a request is; changes of level are many and small.
_EVENTS: Final = {
    "preempted": ("v", "#D55E00"),
    "offloaded": ("<", "#000000"),
    "uploaded": (">", "#000000"),
    "resumed": ("^", "#009E73"),
    "demoted": ("|", "#888888"),
    "promoted": ("|", "#888888"),
}
_ITERATION: Final = "fastserve.iteration"


@dataclass(frozen=True)
class Bar:
    """A span: seconds since the trace began."""

    service: str
    name: str
    start: float
    end: float
    events: Sequence[tuple[str, float]] = ()


def bars(data: TracesData) -> list[Bar]:
    """The spans of a trace, parents first, those of one name together.

    Raises ValueError if there is none.
    """
    spans = [
        (_service(resource.resource.attributes), span)
        for resource in data.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    if not spans:
        raise ValueError("the trace holds no span")
    began = min(span.start_time_unix_nano for _, span in spans)

    def since(nanoseconds: int) -> float:
        return (nanoseconds - began) / 1e9

    found = [
        Bar(
            service,
            span.name,
            since(span.start_time_unix_nano),
            since(span.end_time_unix_nano),
            tuple((event.name, since(event.time_unix_nano)) for event in span.events),
        )
        for service, span in spans
    ]
    first = {bar.name: min(b.start for b in found if b.name == bar.name) for bar in found}
    return sorted(
        found, key=lambda bar: (bar.name == _ITERATION, first[bar.name], bar.name, bar.start)
    )


def pauses(bar: Bar) -> list[tuple[float, float]]:
    """From each preemption to when the request went on, or ended."""
    found, since = [], None
    for event, at in bar.events:
        if event == "preempted" and since is None:
            since = at
        elif event == "resumed" and since is not None:
            found.append((since, at))
            since = None
    return found if since is None else [*found, (since, bar.end)]


def draw(found: Sequence[Bar], title: str) -> Figure:
    """A line per name of spans, a colour per service, marks for events."""
    names = list(dict.fromkeys(bar.name for bar in found))
    services = list(dict.fromkeys(bar.service for bar in found))
    figure = Figure(figsize=(11, 0.9 + 0.55 * len(names)), layout="constrained")
    axes = figure.subplots()
    shown: set[str] = set()
    for bar in found:
        y = names.index(bar.name)
        colour = COLOURS[services.index(bar.service) % len(COLOURS)]
        label = None if bar.service in shown else bar.service
        shown.add(bar.service)
        axes.barh(
            y,
            bar.end - bar.start,
            left=bar.start,
            height=0.5,
            color=colour,
            alpha=0.55,
            label=label,
        )
        for start, end in pauses(bar):
            label = None if "paused" in shown else "paused"
            shown.add("paused")
            axes.barh(y, end - start, left=start, height=0.5, color="white", ec="#888888",
                      hatch="//", lw=0, label=label)  # fmt: skip
        for event, at in bar.events:
            marker, ink = _EVENTS.get(event, ("o", "#888888"))
            label = None if event in shown else event
            shown.add(event)
            axes.plot(at, y, marker=marker, color=ink, ms=7, ls="none", label=label)
    for name in names:
        of_name = [bar for bar in found if bar.name == name]
        if len(of_name) == 1:
            text = f"  {_duration(of_name[0].end - of_name[0].start)}"
            axes.text(of_name[0].end, names.index(name), text, fontsize=8, va="center")
    axes.set_xlim(0, 1.08 * max(bar.end for bar in found))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the request came in")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=9, fontsize=8, frameon=False)
    return figure


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _service(attributes: Iterable[KeyValue]) -> str:
    found = (pair.value.string_value for pair in attributes if pair.key == "service.name")
    return next(found, "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a trace as a timeline.")
    parser.add_argument("trace", type=Path, help="OTLP TracesData, protobuf")
    parser.add_argument("png", type=Path)
    parser.add_argument("--title", default="One request, preempted and resumed")
    arguments = parser.parse_args()
    data = TracesData.FromString(arguments.trace.read_bytes())
    with mpl.rc_context({"svg.hashsalt": "fastserve"}):
        draw(bars(data), arguments.title).savefig(
            arguments.png, dpi=110, metadata={"Software": None}
        )


if __name__ == "__main__":
    main()
