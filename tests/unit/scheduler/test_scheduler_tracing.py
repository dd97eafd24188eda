"""Spans of jobs, from events."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from fastserve.proto.v1.sampling_pb2 import SamplingParams
from fastserve.scheduler.clock import Clock
from fastserve.scheduler.core import Event, EventKind, FinishReason, Job, JobSpec
from fastserve.scheduler.jobs import End, JobRecord
from fastserve.scheduler.tracing import JobTraces

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class SteadyClock(Clock):
    """Core time 0 is unix time 1000."""

    def now(self) -> float:
        return 0.0

    def unix(self) -> float:
        return 1000.0


class Traces:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.jobs = JobTraces(provider.get_tracer("test"), SteadyClock())

    def event(self, kind: EventKind, now: float, level: int = 0) -> None:
        self.jobs.event(Event("a", kind, level, now))

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())


@pytest.fixture
def traces() -> Traces:
    return Traces()


def record_of(traceparent: str = SAMPLED, output: tuple[int, ...] = ()) -> JobRecord:
    spec = JobSpec("a", prompt=(1, 2, 3), max_tokens=9, arrival=1.0)
    job = Job(spec, seq=0, now=1.0)
    job.output.extend(output)
    return JobRecord(
        spec=spec,
        output=job.output,
        job=job,
        sampling=SamplingParams(),
        traceparent=traceparent,
        arrival_unix_s=0.0,
        deadline_unix_s=0.0,
    )


def times(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None and span.end_time is not None
    return span.start_time / 1e9 - 1000, span.end_time / 1e9 - 1000


def test_queue_prefill_decode(traces: Traces) -> None:
    record = record_of()
    traces.jobs.begin(record, 1.0)
    traces.event(EventKind.QUEUED, 1.0)
    traces.event(EventKind.STARTED, 2.0)
    traces.jobs.first_token("a", 3.0)
    traces.event(EventKind.DEMOTED, 4.0, level=2)
    traces.event(EventKind.PREEMPTED, 4.5, level=2)
    traces.event(EventKind.OFFLOADED, 4.6, level=2)
    traces.event(EventKind.UPLOADED, 5.0, level=2)
    traces.event(EventKind.STARTED, 5.5, level=2)
    traces.event(EventKind.PROMOTED, 6.0)
    record.end = End(FinishReason.STOP, "")
    traces.jobs.finish(record, 7.0)
    queue, prefill, decode = traces.spans
    assert [span.name for span in traces.spans] == [
        "fastserve.queue",
        "fastserve.prefill",
        "fastserve.decode",
    ]
    assert [times(span) for span in traces.spans] == [(1, 2), (2, 3), (3, 7)]
    for span in traces.spans:
        assert span.context is not None and span.parent is not None
        assert f"{span.context.trace_id:032x}" == SAMPLED.split("-")[1]
        assert f"{span.parent.span_id:016x}" == SAMPLED.split("-")[2]
        assert span.attributes is not None
        assert span.attributes["fastserve.job.id"] == "a"
    assert not queue.events and not prefill.events
    assert [event.name for event in decode.events] == [
        "demoted",
        "preempted",
        "offloaded",
        "uploaded",
        "resumed",
        "promoted",
    ]
    assert decode.events[0].attributes == {"fastserve.level": 2}
    assert decode.events[0].timestamp == 1004 * 10**9
    assert decode.attributes is not None
    assert decode.attributes["gen_ai.response.finish_reasons"] == ("stop",)


@pytest.mark.parametrize("traceparent", ["", SAMPLED[:-1] + "0", "nonsense"])
def test_jobs_that_are_not_sampled_cost_nothing(traces: Traces, traceparent: str) -> None:
    record = record_of(traceparent)
    traces.jobs.begin(record, 1.0)
    traces.event(EventKind.STARTED, 2.0)
    traces.jobs.first_token("a", 3.0)
    record.end = End(FinishReason.STOP, "")
    traces.jobs.finish(record, 4.0)
    assert traces.spans == []


def test_a_failure_is_an_error(traces: Traces) -> None:
    record = record_of()
    traces.jobs.begin(record, 1.0)
    record.end = End(FinishReason.FAILED, "not a number")
    traces.jobs.finish(record, 2.0)
    (span,) = traces.spans
    assert span.name == "fastserve.queue"
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "not a number"


def test_a_restored_job_goes_on_in_a_new_span(traces: Traces) -> None:
    record = record_of(output=(5,))
    traces.jobs.begin(record, 3.0, restored=True)
    traces.event(EventKind.STARTED, 4.0)
    traces.jobs.close(5.0)
    (span,) = traces.spans
    assert span.name == "fastserve.decode"
    assert times(span) == (3, 5)
    assert span.attributes is not None
    assert span.attributes["fastserve.restored"] is True
