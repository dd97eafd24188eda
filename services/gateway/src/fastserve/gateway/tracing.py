"""One SERVER span per request for an answer. The scheduler's spans become its children."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Final

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from fastserve.common.telemetry import context_from
from fastserve.gateway import semconv
from fastserve.gateway.errors import ApiError
from fastserve.gateway.generation import Generation
from fastserve.gateway.params import Ordering, asked_max_tokens
from fastserve.gateway.schemas import GenerationBody

ANSWER_ROUTES: Final = {
    "/v1/chat/completions": semconv.CHAT,
    "/v1/completions": semconv.TEXT_COMPLETION,
}


@contextlib.contextmanager
def server_span(
    method: str, path: str, request_id: str, headers: Mapping[str, str]
) -> Iterator[Span]:
    """The span of a request, current in the block; none for paths that give no answers."""
    operation = ANSWER_ROUTES.get(path)
    if operation is None or method != "POST":
        yield trace.INVALID_SPAN
        return
    tracer = trace.get_tracer("fastserve.gateway")
    attributes = {
        semconv.OPERATION: operation,
        semconv.PROVIDER: semconv.PROVIDER_NAME,
        semconv.HTTP_METHOD: method,
        semconv.URL_PATH: path,
        semconv.REQUEST_ID: request_id,
    }
    with tracer.start_as_current_span(
        operation, context_from(headers), kind=SpanKind.SERVER, attributes=attributes
    ) as span:
        yield span


def describe_request(
    operation: str, body: GenerationBody, ordering: Ordering, response_id: str
) -> None:
    """Put what the request asks for on the current span. Prompts stay out."""
    span = trace.get_current_span()
    if not span.is_recording():
        return
    span.update_name(f"{operation} {body.model}")
    attributes = {
        semconv.REQUEST_MODEL: body.model,
        semconv.REQUEST_MAX_TOKENS: asked_max_tokens(body)[0],
        semconv.REQUEST_TEMPERATURE: body.temperature,
        semconv.REQUEST_TOP_P: body.top_p,
        semconv.REQUEST_TOP_K: body.top_k,
        semconv.REQUEST_SEED: body.seed,
        semconv.REQUEST_STREAM: bool(body.stream),
        semconv.REQUEST_STOP: body.stop,
        semconv.REQUEST_CHOICES: body.n,
        semconv.REQUEST_FREQUENCY_PENALTY: body.frequency_penalty,
        semconv.REQUEST_PRESENCE_PENALTY: body.presence_penalty,
        semconv.RESPONSE_ID: response_id,
        semconv.RESPONSE_MODEL: body.model,
        semconv.TENANT: ordering.tenant,
        semconv.SERVICE_CLASS: ordering.service_class,
    }
    for name, value in attributes.items():
        if value is not None:
            span.set_attribute(name, value)


def describe_answer(generation: Generation, prompt_tokens: int) -> None:
    """Put what came of it on the current span."""
    span = trace.get_current_span()
    if not span.is_recording():
        return
    span.set_attribute(semconv.INPUT_TOKENS, prompt_tokens)
    span.set_attribute(semconv.CACHED_TOKENS, generation.cached_tokens)
    span.set_attribute(semconv.OUTPUT_TOKENS, generation.completion_tokens)
    reasons = [choice.finish_reason or "" for choice in generation.choices]
    span.set_attribute(semconv.RESPONSE_FINISH_REASONS, reasons)
    if generation.first_token_s is not None:
        span.set_attribute(semconv.RESPONSE_FIRST_CHUNK, generation.first_token_s)


def end_span(span: Span, status: int, error: ApiError | None) -> None:
    """The HTTP side of it. Only what is our fault makes the span an error."""
    span.set_attribute(semconv.HTTP_STATUS, status)
    if error is not None:
        span.set_attribute(semconv.ERROR_TYPE, error.code or str(error.status))
        if error.status >= 500:
            span.set_status(Status(StatusCode.ERROR, error.message))
