"""Metrics of the gateway: requests as clients see them. Times are in seconds.

Names with a colon are vLLM's, so that dashboards and autoscalers made for it work unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fastserve.gateway.errors import ApiError

_SECONDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_TOKENIZE: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 100_000)

_OUTCOMES: Final = {
    401: "rejected_unauthorized",
    403: "rejected_unauthorized",
    429: "rejected_capacity",
    499: "cancelled",
    503: "rejected_no_workers",
    504: "evicted_ttl",
}


def outcome_of(status: int, error: ApiError | None) -> str:
    """How a request for an answer ended, as a label with few values."""
    if error is None:
        return "completed" if status < 400 else "rejected_invalid"
    if error.status == 503 and status < 400:
        return "failed"  # it was accepted and lost its scheduler later
    return _OUTCOMES.get(error.status, "failed" if error.status >= 500 else "rejected_invalid")


class Metrics:
    """One set of instruments per gateway."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=buckets)

        self.http_requests = counter(
            "fastserve_http_requests", "HTTP requests answered", "method", "route", "status"
        )
        self.http_in_flight = gauge("fastserve_http_requests_in_flight", "HTTP requests under way")
        self.incoming = counter(
            "fastserve_gateway_incoming_requests",
            "Requests for an answer, refused ones included",
            "route",
        )
        self.requests = counter(
            "fastserve_gateway_requests",
            "Requests for an answer by how they ended or were refused",
            "route",
            "outcome",
        )
        self.unknown_class = counter(
            "fastserve_unknown_class_requests", "Requests of a class that does not exist"
        )
        self.capped_class = counter(
            "fastserve_capped_class_requests",
            "Requests that asked for a higher class than their API key grants",
        )
        self.tokenize = histogram(
            "fastserve_tokenize_seconds",
            "Template and tokens of a prompt, waiting included",
            _TOKENIZE,
        )
        self.pings = counter("fastserve_stream_pings", "Comments sent on silent streams")
        self.connected = gauge(
            "fastserve_scheduler_connected", "1 if there is a stream to the scheduler", "shard"
        )
        self.ready = gauge("fastserve_scheduler_ready", "1 if the scheduler has a worker", "shard")
        self.stream_losses = gauge(
            "fastserve_scheduler_stream_losses", "Streams to the scheduler that broke", "shard"
        )
        self.jobs = gauge("fastserve_gateway_jobs", "Jobs under way for requests", "shard")

        model = "model_name"
        self.ttft = histogram(
            "vllm:time_to_first_token_seconds", "Request to first token", _SECONDS, model
        )
        self.itl = histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a choice", _PER_TOKEN, model
        )
        self.tpot = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time per token after the first of a choice",
            _PER_TOKEN,
            model,
        )
        self.e2e = histogram(
            "vllm:e2e_request_latency_seconds", "Request to end of its answer", _SECONDS, model
        )
        self.success = counter(
            "vllm:request_success", "Choices that ended", model, "finished_reason"
        )
        self.prompt_tokens = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request", _TOKENS, model
        )
        self.generation_tokens = histogram(
            "vllm:request_generation_tokens", "Tokens of a choice", _TOKENS, model
        )


class RequestTimes:
    """When the tokens of one accepted request come."""

    def __init__(
        self,
        metrics: Metrics,
        model: str,
        started: float,
        choices: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`started`: when the request came in, by `clock`."""
        self._metrics = metrics
        self._model = model
        self._started = started
        self._clock = clock
        self._itl = metrics.itl.labels(model)
        self._first: list[float | None] = [None] * choices
        self._last = [0.0] * choices
        self.first_token_s: float | None = None  # since the request came in

    def tokens(self, choice: int, count: int) -> None:
        """`count` tokens of a choice came, at least one."""
        now = self._clock()
        if self.first_token_s is None:
            self.first_token_s = now - self._started
            self._metrics.ttft.labels(self._model).observe(self.first_token_s)
        if self._first[choice] is None:
            self._first[choice] = now
        else:
            self._itl.observe((now - self._last[choice]) / count)
        self._last[choice] = now

    def finish(self, choice: int, reason: str, tokens: int) -> None:
        """A choice is complete."""
        self._metrics.success.labels(self._model, reason).inc()
        self._metrics.generation_tokens.labels(self._model).observe(tokens)
        first = self._first[choice]
        if first is not None and tokens > 1:
            mean = (self._last[choice] - first) / (tokens - 1)
            self._metrics.tpot.labels(self._model).observe(mean)

    def complete(self) -> None:
        """The whole answer is."""
        self._metrics.e2e.labels(self._model).observe(self._clock() - self._started)
