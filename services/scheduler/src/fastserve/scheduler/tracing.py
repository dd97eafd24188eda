"""Spans of traced jobs: fastserve.queue, then fastserve.prefill, then fastserve.decode.

They are children of the traceparent the job came with and carry what happened to it as events.
Start and end times are those of the core's events. Jobs that are not traced or not sampled cost a
look-up; nothing is done per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from opentelemetry.trace import Span, Status, StatusCode, Tracer, get_current_span

from fastserve.common.telemetry import context_from
from fastserve.scheduler.clock import Clock
from fastserve.scheduler.core import Event, EventKind, FinishReason
from fastserve.scheduler.jobs import JobRecord

QUEUE: Final = "fastserve.queue"
PREFILL: Final = "fastserve.prefill"
DECODE: Final = "fastserve.decode"

JOB_ID: Final = "fastserve.job.id"
LEVEL: Final = "fastserve.level"
PREEMPTIONS: Final = "fastserve.preemptions"
RESTORED: Final = "fastserve.restored"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"

_EVENTS: Final = {
    EventKind.STARTED: "resumed",
    EventKind.PREEMPTED: "preempted",
    EventKind.OFFLOADED: "offloaded",
    EventKind.UPLOADED: "uploaded",
    EventKind.DROPPED: "dropped",
    EventKind.DEMOTED: "demoted",
    EventKind.PROMOTED: "promoted",
    EventKind.MIGRATED: "migrated",
}


@dataclass(slots=True)
class _Trace:
    context: Any
    name: str
    span: Span


class JobTraces:
    """The open span of every sampled job."""

    def __init__(self, tracer: Tracer, clock: Clock) -> None:
        self._tracer = tracer
        self._clock = clock
        self._traces: dict[str, _Trace] = {}

    def begin(self, record: JobRecord, now: float, *, restored: bool = False) -> None:
        """A job came in, or came back from Redis after a change of leader."""
        if not record.traceparent:
            return
        context = context_from({"traceparent": record.traceparent})
        if not get_current_span(context).get_span_context().is_valid:
            return  # not a traceparent: a span of our own would belong to nothing
        name = DECODE if restored and record.output else QUEUE
        span = self._start(name, context, record.job_id, now)
        if not span.is_recording():
            return
        span.set_attribute(INPUT_TOKENS, len(record.spec.prompt))
        if restored:
            span.set_attribute(RESTORED, True)
        self._traces[record.job_id] = _Trace(context, name, span)

    def event(self, event: Event) -> None:
        trace = self._traces.get(event.job_id)
        if trace is None:
            return
        if event.kind is EventKind.STARTED and trace.name == QUEUE:
            self._next(event.job_id, trace, PREFILL, event.now)
        elif event.kind in _EVENTS:
            name, attributes = _EVENTS[event.kind], {LEVEL: event.level}
            trace.span.add_event(name, attributes, timestamp=self._ns(event.now))

    def first_token(self, job_id: str, now: float) -> None:
        trace = self._traces.get(job_id)
        if trace is not None and trace.name != DECODE:
            self._next(job_id, trace, DECODE, now)

    def finish(self, record: JobRecord, now: float) -> None:
        """Its last span ends."""
        trace = self._traces.pop(record.job_id, None)
        if trace is None or record.end is None:
            return
        span = trace.span
        span.set_attribute(OUTPUT_TOKENS, len(record.output))
        span.set_attribute(FINISH_REASONS, [record.end.reason.lower()])
        if record.job is not None:
            span.set_attribute(PREEMPTIONS, record.job.preemptions)
        if record.end.reason in (FinishReason.FAILED, FinishReason.DEADLINE):
            span.set_status(Status(StatusCode.ERROR, record.end.error))
        span.end(self._ns(now))

    def close(self, now: float) -> None:
        """This process leads no more: end what is open, so that it is exported."""
        for trace in self._traces.values():
            trace.span.end(self._ns(now))
        self._traces.clear()

    def _next(self, job_id: str, trace: _Trace, name: str, now: float) -> None:
        trace.span.end(self._ns(now))
        trace.name, trace.span = name, self._start(name, trace.context, job_id, now)

    def _start(self, name: str, context: Any, job_id: str, now: float) -> Span:
        return self._tracer.start_span(
            name, context, attributes={JOB_ID: job_id}, start_time=self._ns(now)
        )

    def _ns(self, now: float) -> int:
        return round(self._clock.to_unix(now) * 1e9)
