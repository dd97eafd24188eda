"""One deployment as users meet it: clients, limits, metrics, traces, the command line."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from support.deployment import MODEL, Deployment, command, deployment
from support.otlp import Collector, collector
from support.streams import TIMEOUT, Answer, body_of, stream
from support.waiting import eventually

KEY = "sk-e2e"
HEADERS = {"Authorization": f"Bearer {KEY}"}
QUEUE = 50


@pytest.fixture(scope="module")
def receiver() -> Iterator[Collector]:
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, receiver: Collector) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("serving")
    flags = ("--api-key", KEY, "--max-num-queued-reqs", str(QUEUE), "--max-num-seqs", "16")
    tracing = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with deployment(folder, *flags, **tracing) as system:
        yield system


@pytest.fixture
async def client(running: Deployment) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=running.url, headers=HEADERS, timeout=TIMEOUT, limits=limits
    ) as found:
        yield found


def test_the_openai_client(running: Deployment) -> None:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        asked: list[dict[str, str]] = [
            {"role": "user", "content": "What is the capital of France?"}
        ]
        whole = client.chat.completions.create(
            model=MODEL,
            messages=asked,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=20,
        )
        assert "Paris" in (whole.choices[0].message.content or "")
        pieces = client.chat.completions.create(
            model=MODEL,
            messages=asked,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=20,
            stream=True,
        )
        chunks = [chunk for chunk in pieces if isinstance(chunk, ChatCompletionChunk)]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                model=MODEL,
                messages=asked,  # type: ignore[arg-type]
                max_tokens=10**6,
            )
        assert refused.value.param == "max_tokens"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="no-such-model", messages=asked)  # type: ignore[arg-type]
    with (
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


async def test_the_same_seed_gives_the_same_answer(client: httpx.AsyncClient) -> None:
    body = body_of("The sea is", 12, temperature=1.0, top_p=0.9, seed=7)
    alone = await stream(client, body, Answer())
    others = body_of("Mountains are", 20, temperature=1.0, seed=8)
    async with asyncio.TaskGroup() as tasks:
        again = tasks.create_task(stream(client, body, Answer()))
        tasks.create_task(stream(client, others, Answer()))
    assert again.result().text == alone.text


async def test_two_hundred_at_once(running: Deployment, client: httpx.AsyncClient) -> None:
    """Beyond the queue limit: 429 with a hint; everyone else is served, also one that streamed."""
    before, during = Answer(), []
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stream(client, body_of("Count: 1, 2, 3,", 40), before))
        await before.reached(3)
        body = body_of("Say something:", 2, stream=False)
        del body["stream_options"]
        during = [tasks.create_task(client.post("/v1/completions", json=body)) for _ in range(200)]
    assert before.usage["completion_tokens"] == 40
    answers = [task.result() for task in during]
    served = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(served) + len(refused) == 200
    assert len(served) >= QUEUE and refused
    assert len({answer.json()["choices"][0]["text"] for answer in served}) == 1
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"


async def test_a_client_that_goes_away_frees_its_row(
    running: Deployment, client: httpx.AsyncClient
) -> None:
    answer = Answer()
    going = asyncio.create_task(stream(client, body_of("Once upon a time", 2000), answer))
    await answer.reached(3)
    going.cancel()
    await asyncio.gather(going, return_exceptions=True)
    await eventually(
        lambda: running.metric("scheduler", "fastserve_requests_total", outcome="cancelled") >= 1,
        "cancellation",
    )
    await eventually(
        lambda: (
            running.metric("worker", "vllm:kv_cache_usage_perc") == 0.0
            or running.metric("scheduler", "vllm:num_requests_running") == 0.0
        ),
        "release",
    )


async def test_one_trace_through_all_services(
    client: httpx.AsyncClient, receiver: Collector
) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    parent = f"00-{trace_id}-00f067aa0ba902b7-01"
    body = body_of("Hello", 5)
    async with client.stream(
        "POST", "/v1/completions", json=body, headers={"traceparent": parent}
    ) as response:
        await response.aread()
    wanted = {
        "fastserve-gateway": 1,  # the request
        "fastserve-scheduler": 3,  # queue, prefill, decode
        "fastserve-worker": 1,  # its first iteration
    }

    def complete() -> bool:
        found = receiver.of_trace(bytes.fromhex(trace_id))
        return all(len(found.get(service, [])) >= count for service, count in wanted.items())

    await eventually(complete, "the trace", timeout=20.0)
    spans = receiver.of_trace(bytes.fromhex(trace_id))
    (server,) = [span for span in spans["fastserve-gateway"] if span.kind == span.SPAN_KIND_SERVER]
    assert server.parent_span_id.hex() == "00f067aa0ba902b7"
    attributes = {attribute.key for attribute in server.attributes}
    assert {"gen_ai.request.model", "gen_ai.usage.output_tokens"} <= attributes
    stages = {span.name: span for span in spans["fastserve-scheduler"]}
    assert set(stages) == {"fastserve.queue", "fastserve.prefill", "fastserve.decode"}
    assert all(span.parent_span_id == server.span_id for span in stages.values())


def test_metrics_of_every_service(running: Deployment) -> None:
    expected = {
        "gateway": "fastserve_gateway_requests_total",
        "scheduler": "fastserve_requests_total",
        "worker": "vllm:generation_tokens_total",
        "kv-offload": "fastserve_host_kv_slots",
    }
    for service, name in expected.items():
        assert running.metric(service, name) > 0, f"{service} has no {name}"


def test_the_command_line(running: Deployment, tmp_path: Path) -> None:
    here = ("--state-dir", str(running.folder))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments), capture_output=True, text=True, timeout=60, check=False
        )

    status = run("status", "--json", *here)
    assert status.returncode == 0, status.stderr
    found = json.loads(status.stdout)
    assert found["ready"] and found["url"] == running.url
    assert {service["state"] for service in found["services"].values()} == {"ready"}

    chat = run("chat", "What is the capital of France?", "--api-key", KEY, "--temperature", "0",
               "--max-tokens", "20", *here)  # fmt: skip
    assert chat.returncode == 0, chat.stderr
    assert "Paris" in chat.stdout

    denied = run("chat", "Hello", *here)
    assert denied.returncode == 1 and "401" in denied.stderr and "Traceback" not in denied.stderr

    second = run("up", *here)
    assert second.returncode == 1
    assert running.url in second.stderr and "fastserve down" in second.stderr

    taken = run("up", "--port", running.url.rpartition(":")[2], "--state-dir", str(tmp_path))
    assert taken.returncode == 1 and "--port" in taken.stderr

    nothing = run("status", "--state-dir", str(tmp_path))
    assert nothing.returncode == 3


def test_top_shows_what_runs(running: Deployment) -> None:
    result = subprocess.run(
        command("top", "--once", "--state-dir", str(running.folder)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    words = [line.split() for line in result.stdout.splitlines()]
    assert ["shard", "0", "fastserve"] in [line[:3] for line in words]
    assert any(line[:3] == ["worker-0", MODEL, "0"] for line in words), result.stdout
    assert any(line[:2] == ["device", "worker-0"] for line in words)
    assert any(line[:1] == ["host"] for line in words), "the sidecar's metrics are read, too"
