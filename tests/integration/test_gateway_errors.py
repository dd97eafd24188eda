"""Bad input: an OpenAI-style error each time, and the gateway goes on serving."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastserve.gateway.tokenizer import Tokenizer
from fastserve.proto.v1 import sampling_pb2, scheduler_pb2
from support.fake_scheduler import MODEL, UNFINISHED, Refusal, Reply, Script, Stack, running_gateway
from support.waiting import eventually

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
MAX_BODY = 8000


@pytest.fixture
async def stack(default_model_folder: Path, default_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    """A gateway that must still answer when the test is over."""
    async with running_gateway(
        default_model_folder, default_tokenizer, max_body_size=MAX_BODY, max_n=4, max_prompts=3
    ) as running:
        yield running
        await assert_serves(running)


async def assert_serves(stack: Stack) -> None:
    stack.scheduler.ready = True
    stack.says("fine")
    response = await stack.chat()
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "fine"


def assert_error(
    response: httpx.Response, status: int, param: str | None, code: str | None, **fields: str
) -> str:
    """The message of the error, which must have the shape that OpenAI's clients read."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == fields.get("type", "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)
    message = error["message"]
    assert isinstance(message, str)
    assert message
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    return message


async def post_raw(stack: Stack, content: bytes, **headers: str) -> httpx.Response:
    headers = {"Content-Type": "application/json"} | headers
    return await stack.http.post(CHAT, content=content, headers=headers)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"model": "x",}', b"[]", b'"text"', b"{}x", b"[" * 5000]
)
async def test_malformed_json(stack: Stack, content: bytes) -> None:
    assert_error(await post_raw(stack, content), 400, None, "invalid_json")


async def test_invalid_utf8(stack: Stack) -> None:
    content = (
        json.dumps({"model": MODEL, "messages": MESSAGES}).encode().replace(b"Hi", b"\xff\xfe")
    )
    assert_error(await post_raw(stack, content), 400, None, "invalid_json")


async def test_half_a_surrogate_pair(stack: Stack) -> None:
    content = json.dumps({"model": MODEL, "messages": MESSAGES}).encode()
    assert_error(
        await post_raw(stack, content.replace(b"Hi", b"\\ud83d")), 400, None, "invalid_json"
    )


async def test_body_that_is_not_said_to_be_json(stack: Stack) -> None:
    response = await stack.http.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"})
    assert_error(response, 415, None, None)


WRONG_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"n": "2"}, "n"),
    ({"n": True}, "n"),
    ({"stream": "yes"}, "stream"),
    ({"stop": 5}, "stop"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"seed": 2**70}, "seed"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "king", "content": "Hi"}]}, "messages.0.role"),
    ({"model": 5}, "model"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG_TYPES, ids=lambda value: str(value)[:40])
async def test_wrong_types_and_values(stack: Stack, fields: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "messages": MESSAGES, **fields}
    response = await stack.http.post(CHAT, json=body)
    assert_error(response, 400, param, "invalid_value")
    assert not stack.scheduler.submits


async def test_missing_parameter(stack: Stack) -> None:
    response = await stack.http.post(CHAT, json={"model": MODEL})
    assert_error(response, 400, "messages", "missing_required_parameter")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", None),
        ({"store": True}, "store", "unsupported_parameter"),
    ],
)
async def test_what_is_not_supported_is_refused(
    stack: Stack, fields: dict[str, Any], param: str, code: str | None
) -> None:
    assert_error(await stack.chat(**fields), 400, param, code or "unsupported_parameter")


async def test_image_content_is_refused(stack: Stack) -> None:
    part = {"type": "image_url", "image_url": {"url": "x"}}
    response = await stack.http.post(
        CHAT, json={"model": MODEL, "messages": [{"role": "user", "content": [part]}]}
    )
    assert response.json()["error"]["param"].startswith("messages.0.content.0")
    assert response.status_code == 400


@pytest.mark.parametrize("fields", [{"suffix": "x"}, {"best_of": 2}, {"echo": True, "logprobs": 1}])
async def test_unsupported_completion_fields(stack: Stack, fields: dict[str, Any]) -> None:
    assert_error(await stack.complete(**fields), 400, next(iter(fields)), "unsupported_parameter")


async def test_unknown_model(stack: Stack) -> None:
    response = await stack.chat(model="gpt-17")
    assert "gpt-17" in assert_error(response, 404, "model", "model_not_found")
    response = await stack.http.get("/v1/models/gpt-17")
    assert_error(response, 404, "model", "model_not_found")


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", ""]])
async def test_empty_prompt(stack: Stack, prompt: Any) -> None:
    assert_error(await stack.complete(prompt), 400, "prompt", "invalid_value")


async def test_no_messages(stack: Stack) -> None:
    response = await stack.http.post(CHAT, json={"model": MODEL, "messages": []})
    assert_error(response, 400, "messages", "invalid_value")


async def test_over_long_prompt(stack: Stack) -> None:
    message = assert_error(
        await stack.complete("word " * 300), 400, "prompt", "context_length_exceeded"
    )
    assert "200" in message
    response = await stack.chat("word " * 300)
    assert_error(response, 400, "messages", "context_length_exceeded")
    assert not stack.scheduler.submits


async def test_too_many_prompts(stack: Stack) -> None:
    assert_error(await stack.complete(["a"] * 4), 400, "prompt", None)


async def test_prompt_tokens_outside_the_vocabulary(stack: Stack) -> None:
    assert_error(await stack.complete([5, 10**6]), 400, "prompt", None)
    assert_error(await stack.complete([5, -1]), 400, "prompt", None)


@pytest.mark.parametrize("param", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [0, -1])
async def test_max_tokens_below_one(stack: Stack, param: str, value: int) -> None:
    assert_error(await stack.chat("Hi", **{param: value}), 400, param, "invalid_value")


async def test_max_tokens_beyond_the_limit(stack: Stack) -> None:
    for param in ("max_tokens", "max_completion_tokens"):
        response = await stack.chat("Hi", **{param: 200})
        assert_error(response, 400, param, "context_length_exceeded")
    assert_error(
        await stack.complete(max_tokens=2**40), 400, "max_tokens", "context_length_exceeded"
    )
    assert not stack.scheduler.submits


async def test_min_tokens_beyond_max_tokens(stack: Stack) -> None:
    assert_error(await stack.chat(max_tokens=3, min_tokens=4), 400, "min_tokens", None)


@pytest.mark.parametrize(
    ("bias", "param", "code"),
    [
        ({"cat": 1}, "logit_bias", None),
        ({"99999999": 1}, "logit_bias", None),
        ({"-1": 1}, "logit_bias", None),
        ({"5": 101}, "logit_bias.5", "invalid_value"),
        ({"5": "much"}, "logit_bias.5", "invalid_value"),
        ([5], "logit_bias", "invalid_value"),
    ],
)
async def test_bad_logit_bias(stack: Stack, bias: Any, param: str, code: str | None) -> None:
    assert_error(await stack.chat(logit_bias=bias), 400, param, code)


async def test_n_too_large(stack: Stack) -> None:
    assert "4" in assert_error(await stack.chat(n=5), 400, "n", "invalid_value")
    assert not stack.scheduler.submits


async def test_body_too_large(stack: Stack) -> None:
    response = await stack.chat("x" * MAX_BODY)
    assert str(MAX_BODY) in assert_error(response, 413, None, "request_too_large")


async def test_body_too_large_without_a_length(stack: Stack) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * (MAX_BODY // 5)

    response = await stack.http.post(
        CHAT, content=parts(), headers={"Content-Type": "application/json"}
    )
    assert_error(response, 413, None, "request_too_large")


async def test_unknown_path_and_method(stack: Stack) -> None:
    assert_error(await stack.http.get("/v1/nothing"), 404, None, "not_found")
    response = await stack.http.get(CHAT)
    assert_error(response, 405, None, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"x-request-timeout-ms": "soon"}, "x-request-timeout-ms"),
        ({"x-fastserve-tenant": "a b"}, "x-fastserve-tenant"),
    ],
)
async def test_bad_headers(stack: Stack, headers: dict[str, str], param: str) -> None:
    body = {"model": MODEL, "messages": MESSAGES}
    assert_error(await stack.http.post(CHAT, json=body, headers=headers), 400, param, None)


async def test_bad_token_requests(stack: Stack) -> None:
    assert_error(await stack.http.post("/tokenize", json={}), 400, "prompt", None)
    response = await stack.http.post("/detokenize", json={"tokens": [10**7]})
    assert_error(response, 400, "tokens", None)
    response = await stack.http.post("/detokenize", json={"tokens": ["5"]})
    assert_error(response, 400, "tokens.0", "invalid_value")


@pytest.mark.parametrize("stream", [False, True])
async def test_full_queue(stack: Stack, stream: bool) -> None:  # vllm #18826, PR #49330
    reason = scheduler_pb2.REJECT_REASON_QUEUE_FULL
    stack.scheduler.reply = Refusal(reason, "the queue is full", retry_after_s=3)
    response = await stack.chat(stream=stream)
    assert_error(response, 429, None, "queue_full", type="rate_limit_exceeded")
    assert response.headers["retry-after"] == "3"


async def test_200_requests_on_a_queue_of_50(stack: Stack) -> None:
    gate = asyncio.Event()
    script = stack.script("fine", gate=gate)

    def reply(_: scheduler_pb2.Submit) -> Reply:
        if len(stack.scheduler.submits) <= 50:
            return script
        return Refusal(scheduler_pb2.REJECT_REASON_QUEUE_FULL, "the queue is full")

    stack.scheduler.reply = reply
    asking = [asyncio.ensure_future(stack.chat(stream=at % 2 == 0)) for at in range(200)]
    await eventually(lambda: sum(request.done() for request in asking) == 150, "the refusals")
    gate.set()
    responses = await asyncio.gather(*asking)
    for response in responses:
        if response.status_code == 200:
            assert response.text.endswith("[DONE]\n\n") or response.json()["choices"]
        else:
            assert_error(response, 429, None, "queue_full", type="rate_limit_exceeded")
    assert sum(response.status_code == 200 for response in responses) == 50
    assert stack.metric("fastserve_gateway_incoming_requests_total", route=CHAT) == 200
    outcome = {"route": CHAT, "outcome": "rejected_capacity"}
    assert stack.metric("fastserve_gateway_requests_total", **outcome) == 150


async def test_full_queue_for_one_of_several_choices(stack: Stack) -> None:
    def reply(submit: scheduler_pb2.Submit) -> Script | Refusal:
        if submit.job_id.endswith(".2"):
            return Refusal(scheduler_pb2.REJECT_REASON_QUEUE_FULL, "the queue is full")
        return Script(finish=UNFINISHED)

    stack.scheduler.reply = reply
    response = await stack.chat(n=3)
    assert_error(response, 429, None, "queue_full", type="rate_limit_exceeded")
    assert response.headers["retry-after"] == "1"
    await assert_serves(stack)  # so the scheduler has read the messages before it
    assert {job_id[-2:] for job_id in stack.scheduler.cancelled} == {".0", ".1"}


@pytest.mark.parametrize(
    ("reason", "status", "code", "error_type"),
    [
        (scheduler_pb2.REJECT_REASON_NO_WORKER, 503, "no_workers", "service_unavailable"),
        (scheduler_pb2.REJECT_REASON_DRAINING, 503, "draining", "service_unavailable"),
        (
            scheduler_pb2.REJECT_REASON_TOO_LONG,
            400,
            "context_length_exceeded",
            "invalid_request_error",
        ),
        (scheduler_pb2.REJECT_REASON_INVALID, 400, None, "invalid_request_error"),
        (scheduler_pb2.REJECT_REASON_NOT_FOUND, 500, "internal_error", "server_error"),
    ],
)
async def test_refusals(
    stack: Stack, reason: scheduler_pb2.RejectReason, status: int, code: str | None, error_type: str
) -> None:
    stack.scheduler.reply = Refusal(reason, "not now")
    response = await stack.chat(stream=True)
    assert_error(response, status, None, code, type=error_type)
    assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize(
    ("finish", "status", "code", "error_type"),
    [
        (sampling_pb2.FINISH_REASON_FAILED, 500, "internal_error", "server_error"),
        (sampling_pb2.FINISH_REASON_DEADLINE, 504, "deadline_exceeded", "timeout"),
        (sampling_pb2.FINISH_REASON_CANCELLED, 500, "internal_error", "server_error"),
    ],
)
async def test_jobs_that_fail(
    stack: Stack, finish: sampling_pb2.FinishReason, status: int, code: str, error_type: str
) -> None:
    stack.scheduler.reply = Script(tokens=[5, 6], finish=finish, error="out of luck")
    assert_error(await stack.chat(), status, None, code, type=error_type)
    # Streamed, the status is out already: the error is the last event.
    response = await stack.chat(stream=True)
    assert response.status_code == 200
    *_, last = response.text.removesuffix("\n\n").split("\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == (error_type, code)
    assert error["message"]
    assert "[DONE]" not in response.text


async def test_wrong_key(
    default_model_folder: Path, default_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("# team blue\nfrom-file\n")
    async with running_gateway(
        default_model_folder, default_tokenizer, api_key=["secret"], api_key_file=file
    ) as stack:
        stack.says("fine")
        body = {"model": MODEL, "messages": MESSAGES}
        for authorization in (None, "Bearer wrong", "Bearer", "Basic secret", "Bearer sécret"):
            headers = [(b"Authorization", authorization.encode())] if authorization else []
            response = await stack.http.post(CHAT, json=body, headers=headers)
            assert_error(response, 401, None, "invalid_api_key")
            assert "secret" not in response.text
        for path in ("/v1/models", f"/v1/models/{MODEL}"):
            assert_error(await stack.http.get(path), 401, None, "invalid_api_key")
        for path in ("/tokenize", "/detokenize", "/v1/completions"):
            assert_error(await stack.http.post(path, json={}), 401, None, "invalid_api_key")
        for path in ("/health", "/livez", "/readyz", "/version", "/metrics", "/openapi.json"):
            assert (await stack.http.get(path)).status_code == 200
        for key in ("secret", "from-file"):
            headers = [(b"Authorization", f"Bearer {key}".encode())]
            response = await stack.http.post(CHAT, json=body, headers=headers)
            assert response.status_code == 200


async def test_no_scheduler(default_model_folder: Path, default_tokenizer: Tokenizer) -> None:
    async with running_gateway(
        default_model_folder,
        default_tokenizer,
        connect=False,
        scheduler=["127.0.0.1:1"],
        scheduler_timeout=0.2,
    ) as stack:
        for _ in range(2):
            response = await stack.chat(stream=True)
            assert_error(response, 503, None, "scheduler_unavailable", type="service_unavailable")
            assert int(response.headers["retry-after"]) >= 1
        assert_error(
            await stack.http.get("/readyz"),
            503,
            None,
            "scheduler_unavailable",
            type="service_unavailable",
        )
        assert (await stack.http.get("/livez")).status_code == 200
        assert (await stack.http.get("/health")).json()["ready"] is False


async def test_a_request_that_comes_first_waits_for_the_scheduler(
    default_model_folder: Path, default_tokenizer: Tokenizer
) -> None:
    async with running_gateway(default_model_folder, default_tokenizer, connect=False) as stack:
        await assert_serves(stack)


async def test_no_worker(default_model_folder: Path, default_tokenizer: Tokenizer) -> None:
    """A refused request counts as one that came (production-stack PR #679)."""
    async with running_gateway(default_model_folder, default_tokenizer, connect=False) as stack:
        stack.scheduler.ready = False
        response = await stack.chat()
        assert_error(response, 503, None, "no_workers", type="service_unavailable")
        assert stack.metric("fastserve_gateway_incoming_requests_total", route=CHAT) == 1
        outcome = {"route": CHAT, "outcome": "rejected_no_workers"}
        assert stack.metric("fastserve_gateway_requests_total", **outcome) == 1
        response = await stack.http.get("/readyz")
        assert_error(response, 503, None, "no_workers", type="service_unavailable")


async def test_a_bug_is_an_error_without_details(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("at line 5 of secret.py")

    with monkeypatch.context() as patched:
        patched.setattr("fastserve.gateway.routes.generate.sampling_of", fail)
        response = await stack.chat()
    assert_error(response, 500, None, "internal_error", type="server_error")
