"""A trace as a picture: what is drawn, not how it looks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, TracesData

from fastserve.bench.trace_picture import Bar, bars, draw, main, pauses


def trace() -> TracesData:
    data = TracesData()
    for service, name, start, end in (
        ("worker", "fastserve.iteration", 15, 16),
        ("scheduler", "fastserve.decode", 12, 20),
        ("scheduler", "fastserve.queue", 11, 12),
        ("gateway", "chat m", 10, 21),
    ):
        resource = data.resource_spans.add()
        pair = resource.resource.attributes.add(key="service.name")
        pair.value.string_value = service
        span = resource.scope_spans.add().spans.add(
            name=name, start_time_unix_nano=start * 10**9, end_time_unix_nano=end * 10**9
        )
        if name == "fastserve.decode":
            for event, at in (("preempted", 13), ("resumed", 16), ("preempted", 18)):
                span.events.append(Span.Event(name=event, time_unix_nano=at * 10**9))
    return data


def test_bars_begin_with_the_request_and_end_with_iterations() -> None:
    found = bars(trace())
    names = [bar.name for bar in found]
    assert names == ["chat m", "fastserve.queue", "fastserve.decode", "fastserve.iteration"]
    assert [(bar.start, bar.end) for bar in found] == [(0, 11), (1, 2), (2, 10), (5, 6)]
    assert found[2].service == "scheduler"
    assert found[2].events == (("preempted", 3), ("resumed", 6), ("preempted", 8))


def test_a_pause_lasts_until_the_request_goes_on_or_ends() -> None:
    assert pauses(bars(trace())[2]) == [(3, 6), (8, 10)]
    assert pauses(Bar("s", "n", 0, 1)) == []


def test_everything_is_on_the_picture() -> None:
    figure = draw(bars(trace()), "title")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *("chat m", "fastserve.queue", "fastserve.decode", "fastserve.iteration")
    ]
    texts = {text.get_text() for text in figure.legends[0].get_texts()}
    assert texts == {"gateway", "scheduler", "worker", "paused", "preempted", "resumed"}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trace").write_bytes(trace().SerializeToString())
    pictures = []
    for name in ("a.png", "b.png"):
        arguments = ["trace_picture", str(tmp_path / "trace"), str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", arguments)
        main()
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] and pictures[0].startswith(b"\x89PNG")


def test_an_empty_trace() -> None:
    with pytest.raises(ValueError, match="no span"):
        bars(TracesData())
