"""The gateway as its users and operators see it: OpenAI's client, probes, metrics, traces."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fastserve.gateway.tokenizer import Tokenizer
from fastserve.proto.v1 import sampling_pb2, scheduler_pb2
from support.fake_scheduler import (
    EOS,
    MODEL,
    Refusal,
    Script,
    Stack,
    running_fake_scheduler,
    running_gateway,
)
from support.processes import service
from support.waiting import eventually

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"


@pytest.fixture
async def stack(default_model_folder: Path, default_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    async with running_gateway(
        default_model_folder, default_tokenizer, api_key=["secret"]
    ) as running:
        running.http.headers["Authorization"] = "Bearer secret"
        yield running


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{stack.url}/v1", api_key="secret", max_retries=0
    ) as client:
        yield client


async def test_openai_chat(stack: Stack, client: openai.AsyncOpenAI) -> None:
    stack.says("Hello 😀")
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == "Hello 😀"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_openai_chat_stream(stack: Stack, client: openai.AsyncOpenAI) -> None:
    stack.says("Hello 😀 there")
    text, usage = "", None
    async for chunk in await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == "Hello 😀 there"
    assert usage is not None
    assert usage.completion_tokens > 2


async def test_openai_stream_helper(stack: Stack, client: openai.AsyncOpenAI) -> None:
    stack.says("Hello there")
    async with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, logprobs=True, n=2
    ) as stream:
        final = await stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["Hello there"] * 2


async def test_openai_completion_with_extra_body(stack: Stack, client: openai.AsyncOpenAI) -> None:
    stack.says(" text")
    answer = await client.completions.create(
        model=MODEL, prompt="Some", extra_body={"top_k": 3, "min_tokens": 1, "ignore_eos": True}
    )
    assert answer.choices[0].text == " text"
    assert stack.scheduler.submits[0].sampling.top_k == 3


async def test_openai_models(stack: Stack, client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_openai_errors(stack: Stack, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="other", messages=MESSAGES)
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model=MODEL, messages=[])
    stack.scheduler.reply = Refusal(scheduler_pb2.REJECT_REASON_QUEUE_FULL, "full", 2)
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    stack.scheduler.reply = Script([5], sampling_pb2.FINISH_REASON_FAILED, "out of luck")
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="out of luck"):
        async for _ in stream:
            pass
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()


async def test_request_ids(stack: Stack) -> None:
    response = await stack.http.get("/livez", headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert int(response.headers["openai-processing-ms"]) >= 0
    made = {(await stack.http.get("/livez")).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    bad = await stack.http.get("/livez", headers={"X-Request-Id": "a" * 200})
    assert bad.headers["x-request-id"].startswith("req-")


async def test_status(stack: Stack) -> None:
    assert (await stack.http.get("/readyz")).json() == {"status": "ready"}
    assert (await stack.http.get("/livez")).status_code == 200
    assert (await stack.http.get("/health")).json() == {
        "status": "ok",
        "scheduler_connected": True,
        "ready": True,
    }
    assert set((await stack.http.get("/version")).json()) == {"version"}
    card = (await stack.http.get(f"/v1/models/{MODEL}")).json()
    assert card["object"] == "model"
    assert card["max_model_len"] == 200


async def test_openapi_document(stack: Stack) -> None:
    assert (await stack.http.get("/docs")).status_code == 200
    document = (await stack.http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    for reference in references(document):
        assert reference.rpartition("/")[2] in schemas
    body = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].endswith("ChatCompletionRequest")
    assert "max_completion_tokens" in schemas["ChatCompletionRequest"]["properties"]


async def test_metrics(stack: Stack) -> None:
    stack.says("one two three")
    await stack.chat()
    await stack.chat(stream=True)
    await stack.chat(n=0)
    await eventually(lambda: stack.metric("fastserve_http_requests_in_flight") == 0)
    text = (await stack.http.get("/metrics")).text
    for line in (
        f'fastserve_gateway_incoming_requests_total{{route="{CHAT}"}} 3.0',
        f'fastserve_gateway_requests_total{{outcome="completed",route="{CHAT}"}} 2.0',
        f'fastserve_gateway_requests_total{{outcome="rejected_invalid",route="{CHAT}"}} 1.0',
        f'fastserve_http_requests_total{{method="POST",route="{CHAT}",status="400"}} 1.0',
        'fastserve_scheduler_connected{shard="0"} 1.0',
        'fastserve_scheduler_ready{shard="0"} 1.0',
        'fastserve_gateway_jobs{shard="0"} 0.0',
        f'vllm:time_to_first_token_seconds_count{{model_name="{MODEL}"}} 2.0',
        f'vllm:inter_token_latency_seconds_count{{model_name="{MODEL}"}}',
        f'vllm:e2e_request_latency_seconds_count{{model_name="{MODEL}"}} 2.0',
        f'vllm:request_success_total{{finished_reason="stop",model_name="{MODEL}"}} 2.0',
        f'vllm:request_generation_tokens_sum{{model_name="{MODEL}"}} 8.0',
    ):
        assert line in text


async def test_unknown_class_is_counted(stack: Stack) -> None:
    stack.says("ok")
    body = {"model": MODEL, "messages": MESSAGES}
    await stack.http.post(CHAT, json=body, headers={"x-fastserve-class": "royal"})
    assert stack.scheduler.submits[0].service_class == "default"
    assert stack.metric("fastserve_unknown_class_requests_total") == 1


async def test_deadline_header(stack: Stack) -> None:
    stack.says("ok")
    body = {"model": MODEL, "messages": MESSAGES}
    await stack.http.post(CHAT, json=body, headers={"x-request-timeout-ms": "60000"})
    assert stack.scheduler.submits[0].deadline_unix_s > 0


async def test_one_span_per_request(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    stack.says("one two")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for stream in (False, True):
        spans.clear()
        body = {"model": MODEL, "messages": MESSAGES, "stream": stream, "temperature": 0.5}
        response = await stack.http.post(CHAT, json=body, headers={"traceparent": parent})
        assert response.status_code == 200
        await eventually(spans.get_finished_spans, "the span")
        (span,) = spans.get_finished_spans()
        assert span.name == f"chat {MODEL}"
        assert span.kind is trace.SpanKind.SERVER
        assert span.attributes is not None
        assert span.context is not None
        assert span.attributes["gen_ai.request.model"] == MODEL
        assert span.attributes["gen_ai.request.temperature"] == 0.5
        assert span.attributes["gen_ai.usage.output_tokens"] == 3
        assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)
        assert span.attributes["http.response.status_code"] == 200
        assert span.attributes["gen_ai.response.time_to_first_chunk"] > 0  # type: ignore[operator]
        trace_id, span_id = (trace.format_trace_id(span.context.trace_id), span.context.span_id)
        assert parent.split("-")[1] == trace_id
        sent = stack.scheduler.submits[-1].traceparent
        assert sent == f"00-{trace_id}-{trace.format_span_id(span_id)}-01"
    spans.clear()
    await stack.chat(model="other")
    await eventually(spans.get_finished_spans, "the span")
    (span,) = spans.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["error.type"] == "model_not_found"
    await stack.http.get("/livez")
    assert len(spans.get_finished_spans()) == 1, "probes have no spans"


def test_torch_is_not_imported() -> None:
    code = (
        "import sys, fastserve.gateway.service\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"


async def test_process(default_model_folder: Path, tmp_path: Path) -> None:
    async with running_fake_scheduler() as scheduler:
        tokens = Tokenizer.load(default_model_folder).encode("Hello", add_special_tokens=False)
        gate = asyncio.Event()
        scheduler.reply = Script([*tokens, EOS], gate=gate)
        flags = ["--model", str(default_model_folder), "--scheduler", scheduler.address]
        flags += ["--port", "0", "--api-key", "top-secret"]
        with service("fastserve.gateway", tmp_path, *flags) as process:
            info = process.info
            assert info["pid"] == process.process.pid
            assert info["address"] == f"127.0.0.1:{info['port']}"
            headers = {"Authorization": "Bearer top-secret"}
            url = f"http://{info['address']}"
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=20) as http:
                await eventually(lambda: scheduler.gateways == 1)
                body = {"model": MODEL, "messages": MESSAGES}
                asking = asyncio.ensure_future(http.post(CHAT, json=body))
                await eventually(lambda: scheduler.submits, "the job")
                process.process.send_signal(signal.SIGTERM)
                await eventually(lambda: "stopping" in process.log.read_text())
                gate.set()
                response = await asking
            assert response.json()["choices"][0]["message"]["content"] == "Hello"
            await eventually(lambda: process.process.poll() == 0, "the end")
            log = process.log.read_text()
            assert "top-secret" not in log
            messages = [json.loads(line)["message"] for line in log.splitlines()]
            assert messages[-1] == "stopped"
            assert len(messages) < 8, "no line per request"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model", "/nowhere"], "/nowhere does not exist"),
        (["--port", "99999"], "port: "),
    ],
)
def test_refused_start(default_model_folder: Path, flags: list[str], sentence: str) -> None:
    if "--model" not in flags:
        flags = [*flags, "--model", str(default_model_folder)]
    result = subprocess.run(
        [sys.executable, "-m", "fastserve.gateway", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("fastserve-gateway: ")
    assert sentence in last
