"""What chat and text completions have in common: from a checked body to a response."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from fastapi import Request
from opentelemetry import trace
from starlette.responses import Response

from fastserve.common.telemetry import traceparent_of
from fastserve.gateway.answer_ids import new_answer_id
from fastserve.gateway.answers import AnswerFormat, Collected, Head, Usage
from fastserve.gateway.disconnect import unless_gone
from fastserve.gateway.errors import ApiError, InvalidRequestError, UnavailableError
from fastserve.gateway.generation import (
    Choice,
    Generation,
    TextOptions,
    answer_not_found,
    api_error,
)
from fastserve.gateway.jobs import SchedulerLostError
from fastserve.gateway.metrics import RequestTimes
from fastserve.gateway.middleware import note_error, started_at
from fastserve.gateway.params import (
    Ordering,
    certain_tokens,
    max_tokens_of,
    ordering_of,
    resume_of,
    sampling_of,
    seeds_of,
    tier_of,
)
from fastserve.gateway.schemas import GenerationBody
from fastserve.gateway.sse import EventStream, StreamSettings
from fastserve.gateway.state import Gateway, gateway_of, grant_of
from fastserve.gateway.tracing import describe_answer, describe_request
from fastserve.proto.v1 import sampling_pb2, scheduler_pb2

Prompts = Sequence[list[int]]

_SHORT_BODY: Final = 1024  # bytes; its tokens are made sooner than a thread would begin to


@dataclass(frozen=True)
class Endpoint:
    """How chat and text completions differ. `make_prompts` runs off the event loop."""

    operation: str
    id_prefix: str
    prompts: int
    prompt_param: str
    make_prompts: Callable[[], Prompts]
    make_format: Callable[[Head, Prompts], AnswerFormat]
    logprobs: int | None
    continuation: bool


@dataclass(frozen=True)
class Accepted:
    """A request whose jobs the scheduler took."""

    generation: Generation
    answer: AnswerFormat
    prompt_tokens: int


async def respond(request: Request, body: GenerationBody, endpoint: Endpoint) -> Response:
    """Submit the jobs and answer, streamed or whole. Raises `ApiError`."""
    gateway = gateway_of(request)
    accepted = await unless_gone(request.receive, _begin(request, gateway, body, endpoint))
    if not body.stream:
        return await _whole(request, accepted)

    def end(error: ApiError | None) -> None:
        describe_answer(accepted.generation, accepted.prompt_tokens)
        if error is not None:
            note_error(request.scope, error)

    accepted.generation.may_resume()
    options = body.stream_options
    settings = StreamSettings(
        ping_interval=gateway.settings.ping_interval,
        send_timeout=gateway.settings.send_timeout,
        include_usage=options is not None and bool(options.include_usage),
    )
    return EventStream(
        accepted.generation,
        accepted.answer,
        accepted.prompt_tokens,
        settings,
        on_ping=gateway.metrics.pings.inc,
        on_end=end,
    )


async def _whole(request: Request, accepted: Accepted) -> Response:
    generation = accepted.generation
    try:
        choices = await unless_gone(request.receive, _collect(generation))
    finally:
        generation.close()
        describe_answer(generation, accepted.prompt_tokens)
    usage = Usage(accepted.prompt_tokens, generation.completion_tokens, generation.cached_tokens)
    return Response(accepted.answer.whole(choices, usage), media_type="application/json")


async def _collect(generation: Generation) -> list[Collected]:
    collected = [Collected() for _ in generation.choices]
    while not generation.complete:
        for delta in await generation.next():
            collected[delta.choice].add(delta)
    return collected


async def _begin(
    request: Request, gateway: Gateway, body: GenerationBody, endpoint: Endpoint
) -> Accepted:
    """Everything up to the scheduler's acceptance. Raises `ApiError`."""
    gateway.check_open()
    longest = await _limit(gateway)  # before the checks: the workers name the model
    _check(gateway, body)
    ordering = ordering_of(body, request.headers, grant_of(request))
    if ordering.unknown_class:
        gateway.metrics.unknown_class.inc()
    if ordering.capped_class:
        gateway.metrics.capped_class.inc()
    count = (body.n or 1) * endpoint.prompts
    resume = resume_of(body, request.headers, count)
    client = gateway.shards.of(resume.response_id) if resume else gateway.shards.choose(count)
    if client is None:
        raise answer_not_found()
    response_id = resume.response_id if resume else new_answer_id(endpoint.id_prefix, client.shard)
    describe_request(endpoint.operation, body, ordering, response_id)
    sampling = sampling_of(body, gateway.tokenizer)
    if endpoint.logprobs is not None:
        sampling.logprobs = endpoint.logprobs

    with gateway.metrics.tokenize.time():
        if len(await request.body()) <= _SHORT_BODY:
            prompts = endpoint.make_prompts()
        else:
            prompts = await gateway.pool.run(endpoint.make_prompts)
    submits = _submits(
        body, prompts, sampling, ordering, response_id, longest, endpoint.prompt_param
    )
    model = gateway.model_name
    options = TextOptions(
        stop=body.stop or (),
        min_tokens=body.min_tokens or 0,
        logprobs=endpoint.logprobs is not None,
        continuation=endpoint.continuation,
    )
    seen = resume.seen if resume else [0] * count
    choices = [Choice(at, gateway.tokenizer, options, seen[at]) for at in range(count)]
    times = RequestTimes(gateway.metrics, model, started_at(request.scope), len(submits))
    generation = await Generation.start(
        client, submits, choices, times, n=body.n or 1, attach=resume is not None
    )
    prompt_tokens = sum(map(len, prompts))
    gateway.metrics.prompt_tokens.labels(model).observe(prompt_tokens)
    head = Head(response_id, int(time.time()), model, tier_of(body, ordering))
    answer = endpoint.make_format(head, prompts)
    answer.resume([at for at in range(count) if seen[at]])
    return Accepted(generation, answer, prompt_tokens)


def _check(gateway: Gateway, body: GenerationBody) -> None:
    """Checks of single fields that settings decide."""
    gateway.check_model(body.model)
    if (body.n or 1) > gateway.settings.max_n:
        raise InvalidRequestError(
            f"n may be at most {gateway.settings.max_n}", param="n", code="invalid_value"
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError(
            "stream_options needs stream: true", param="stream_options", code="invalid_value"
        )


async def _limit(gateway: Gateway) -> int:
    """Tokens that a job may have, prompt and output. Raises `UnavailableError`."""
    try:
        await gateway.shards.known()
    except SchedulerLostError as error:
        raise api_error(error) from error
    longest = gateway.max_model_len
    if longest is None:
        raise UnavailableError("no worker has connected yet", "no_workers")
    return longest


def _submits(
    body: GenerationBody,
    prompts: Prompts,
    sampling: sampling_pb2.SamplingParams,
    ordering: Ordering,
    response_id: str,
    longest: int,
    prompt_param: str,
) -> list[scheduler_pb2.Submit]:
    """One job per choice, those of the first prompt first. Raises `InvalidRequestError`."""
    deadline = 0.0 if ordering.timeout_s is None else time.time() + ordering.timeout_s
    traceparent = traceparent_of(trace.get_current_span())
    seeds = seeds_of(body, body.n or 1)
    submits: list[scheduler_pb2.Submit] = []
    for prompt in prompts:
        max_tokens = max_tokens_of(body, len(prompt), longest, prompt_param)
        for seed in seeds:
            submit = scheduler_pb2.Submit(
                job_id=f"{response_id}.{len(submits)}",
                tenant=ordering.tenant,
                tenant_weight=ordering.tenant_weight,
                service_class=ordering.service_class,
                priority=ordering.priority,
                prompt_token_ids=prompt,
                sampling=sampling,
                traceparent=traceparent,
                deadline_unix_s=deadline,
                min_output_tokens=certain_tokens(body, max_tokens),
            )
            submit.sampling.seed = seed
            submit.sampling.max_tokens = max_tokens
            submits.append(submit)
    return submits
