"""Spans of iterations, linked to the requests in them.

One span per iteration would drown a trace. A span is made for the first iteration that a traced job
takes part in, and for one in `EVERY` after that.
"""

from __future__ import annotations

from opentelemetry import trace

from fastserve.common.telemetry import context_from
from fastserve.worker.engine import Iteration

EVERY = 64


class IterationTracer:
    """Makes the spans; costs nothing while no job is traced."""

    def __init__(self) -> None:
        self._tracer = trace.get_tracer("fastserve.worker")
        self._seen: dict[str, None] = {}
        self._count = 0

    def observe(self, iteration: Iteration) -> None:
        """Record a finished iteration if it is one of those to be recorded."""
        if not iteration.traceparents:
            return
        self._count += 1
        fresh = [parent for parent in iteration.traceparents if parent not in self._seen]
        for parent in fresh:
            self._seen[parent] = None
        while len(self._seen) > 4096:
            del self._seen[next(iter(self._seen))]
        if not fresh and self._count % EVERY:
            return
        contexts = [context_from({"traceparent": p}) for p in iteration.traceparents]
        links = [trace.Link(trace.get_current_span(c).get_span_context()) for c in contexts]
        span = self._tracer.start_span(
            "fastserve.iteration",
            # A child of one request, so that its trace shows it; linked to all.
            context=context_from({"traceparent": (fresh or iteration.traceparents)[0]}),
            links=links,
            start_time=int(iteration.started * 1e9),
            attributes={
                "fastserve.iteration": iteration.iteration,
                "fastserve.rows": len(iteration.rows),
                "fastserve.new_tokens": sum(new for _, new, _ in iteration.rows),
                "fastserve.context_tokens": iteration.context_tokens,
            },
        )
        span.end(end_time=int((iteration.started + iteration.seconds) * 1e9))
