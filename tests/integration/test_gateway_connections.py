"""Clients that go away or do not read, silent streams, a scheduler that dies, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastserve.gateway.tokenizer import Tokenizer
from support.fake_scheduler import MODEL, UNFINISHED, Script, Stack, running_gateway
from support.waiting import eventually

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def stack(default_model_folder: Path, default_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    async with running_gateway(
        default_model_folder, default_tokenizer, ping_interval=0.05
    ) as running:
        yield running


def endless(stack: Stack, text: str = "one two") -> Script:
    """Says the text and stays silent."""
    tokens = stack.service.gateway.tokenizer.encode(text, add_special_tokens=False)
    return Script(tokens=tokens, finish=UNFINISHED)


def streaming(
    stack: Stack, **fields: Any
) -> contextlib.AbstractAsyncContextManager[httpx.Response]:
    body = {"model": MODEL, "messages": MESSAGES, "stream": True, **fields}
    return stack.http.stream("POST", "/v1/chat/completions", json=body)


async def raw_request(stack: Stack, **fields: Any) -> tuple[asyncio.StreamReader, Any]:
    """A chat request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.service.port)
    body = json.dumps({"model": MODEL, "messages": MESSAGES, **fields}).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await writer.drain()
    return reader, writer


async def assert_cancelled(stack: Stack, jobs: int = 1) -> None:
    await eventually(lambda: len(stack.scheduler.cancelled) == jobs, "the cancels")
    await eventually(lambda: stack.metric("fastserve_http_requests_in_flight") == 0)
    outcome = {"route": "/v1/chat/completions", "outcome": "cancelled"}
    assert stack.metric("fastserve_gateway_requests_total", **outcome) == 1
    assert stack.service.shards.jobs == 0
    stack.says("fine")
    assert (await stack.chat()).json()["choices"][0]["message"]["content"] == "fine"


async def test_client_gone_in_the_middle_of_a_stream(stack: Stack) -> None:  # ray #61551
    stack.scheduler.reply = endless(stack)
    async with streaming(stack, n=2) as response:
        async for line in response.aiter_lines():
            if "two" in line:
                break
    await assert_cancelled(stack, jobs=2)


async def test_client_gone_while_it_waits_for_the_whole_answer(stack: Stack) -> None:
    stack.scheduler.reply = endless(stack)
    _, writer = await raw_request(stack)
    await eventually(lambda: stack.scheduler.submits, "the job")
    writer.close()
    await writer.wait_closed()
    await assert_cancelled(stack)


async def test_client_gone_in_the_middle_of_its_body(stack: Stack) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", stack.service.port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n{"
    )
    await eventually(lambda: stack.metric("fastserve_http_requests_in_flight") == 1)
    writer.close()
    await writer.wait_closed()
    await eventually(lambda: stack.metric("fastserve_http_requests_in_flight") == 0)
    stack.says("fine")
    assert (await stack.chat()).status_code == 200


async def test_pings_while_the_stream_is_silent(stack: Stack) -> None:
    gate = asyncio.Event()
    stack.says("one two", gate=gate)
    lines = []
    async with streaming(stack) as response:
        async for line in response.aiter_lines():
            lines.append(line)
            if lines.count(": ping") == 2:
                gate.set()
    # They stand between events, so that clients that know no comments are not hurt either.
    assert all(lines[at + 1] == "" for at, line in enumerate(lines) if line == ": ping")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert stack.metric("fastserve_stream_pings_total") >= 2


@pytest.mark.parametrize("kernel_helps", [False, True])
async def test_client_that_does_not_read_is_cut_off(
    default_model_folder: Path,
    default_tokenizer: Tokenizer,
    kernel_helps: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not kernel_helps:
        monkeypatch.delattr(socket, "TCP_USER_TIMEOUT", raising=False)
    async with running_gateway(default_model_folder, default_tokenizer, send_timeout=0.3) as stack:
        await check_slow_reader(stack)


async def check_slow_reader(stack: Stack) -> None:
    # Far more than the buffers of both sockets hold.
    token = stack.service.gateway.tokenizer.encode(" antidisestablishment")[0]
    scores = [(-1.0, list(range(20)), [-1.0] * 20)] * 20_000
    stack.scheduler.reply = Script(
        tokens=[token] * 20_000, logprobs=scores, per_batch=100, finish=UNFINISHED
    )
    _, writer = await raw_request(stack, stream=True, logprobs=True, top_logprobs=20)
    try:
        await assert_cancelled(stack)
    finally:
        writer.close()


async def test_scheduler_that_dies_in_the_middle(
    default_model_folder: Path, default_tokenizer: Tokenizer
) -> None:
    async with running_gateway(
        default_model_folder, default_tokenizer, reattach_timeout=0.1, scheduler_timeout=1.0
    ) as stack:
        stack.scheduler.reply = endless(stack)
        lines = []
        async with streaming(stack) as response:
            async for line in response.aiter_lines():
                lines.append(line)
                if "two" in line:
                    await stack.scheduler.die()
        error = json.loads(lines[-2].removeprefix("data: "))["error"]
        assert error["code"] == "scheduler_unavailable"
        assert error["message"]
        outcome = {"route": "/v1/chat/completions", "outcome": "failed"}
        await eventually(
            lambda: stack.metric("fastserve_gateway_requests_total", **outcome) == 1, "its outcome"
        )
        assert (await stack.chat()).status_code == 503


async def test_running_answers_end_before_the_gateway_does(stack: Stack) -> None:
    gate = asyncio.Event()
    stack.says("one two", gate=gate)
    asking = asyncio.ensure_future(stack.chat())
    await eventually(lambda: stack.scheduler.submits, "the job")
    assert (await stack.http.get("/readyz")).status_code == 200
    stack.stop.set()

    await eventually(stack.service.gateway.draining.is_set, "the end to begin")
    for refused in (await stack.chat(), await stack.complete(), await stack.http.get("/readyz")):
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["Retry-After"]) >= 1
    assert (await stack.http.get("/livez")).status_code == 200
    assert len(stack.scheduler.submits) == 1
    assert not asking.done()
    gate.set()
    response = await asking
    assert response.json()["choices"][0]["message"]["content"] == "one two"
    async with asyncio.timeout(30):
        await stack.task


async def test_answers_that_take_too_long_are_cut_off_at_the_end(
    default_model_folder: Path, default_tokenizer: Tokenizer
) -> None:
    async with running_gateway(
        default_model_folder, default_tokenizer, shutdown_timeout=0.2
    ) as stack:
        stack.scheduler.reply = endless(stack)
        lines = []
        async with streaming(stack) as response:
            whole = asyncio.ensure_future(stack.chat())
            async for line in response.aiter_lines():
                lines.append(line)
                if "two" in line:
                    await eventually(lambda: len(stack.scheduler.submits) == 2)
                    stack.stop.set()
        assert "shutting down" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]
        assert (await whole).status_code == 503
        async with asyncio.timeout(30):
            await stack.task
        streamed, whole_one = (submit.job_id for submit in stack.scheduler.submits)
        # The streamed answer waits for its client at the scheduler: it goes on at another gateway.
        await eventually(lambda: stack.scheduler.cancelled, "the cancel")
        assert stack.scheduler.cancelled == {whole_one} != {streamed}
