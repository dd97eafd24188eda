"""What a key grants, and deadlines, as a client of the gateway sees them."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastserve.gateway.tokenizer import Tokenizer
from support.fake_scheduler import MODEL, Stack, running_gateway
from support.fake_worker import FakeWorker
from support.gateway_client import connected
from support.schedulers import RunningScheduler, running_scheduler
from support.valkey import running_valkey
from support.waiting import eventually

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
KEYS = """
open
acme-key tenant=acme class=default weight=2.5   # the nice people
night tenant=night class=batch
"""


@pytest.fixture
async def stack(
    default_model_folder: Path, default_tokenizer: Tokenizer, tmp_path: Path
) -> AsyncIterator[Stack]:
    file = tmp_path / "keys"
    file.write_text(KEYS)
    async with running_gateway(
        default_model_folder, default_tokenizer, api_key_file=file
    ) as running:
        running.says("ok")
        yield running


async def ask(stack: Stack, key: str, /, *, stream: bool = False, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await stack.http.post(
        CHAT,
        json={"model": MODEL, "messages": MESSAGES, "stream": stream},
        headers={"Authorization": f"Bearer {key}", **named},
    )


async def test_the_tenant_and_weight_of_a_key_reach_the_scheduler(stack: Stack) -> None:
    assert (await ask(stack, "open")).status_code == 200
    assert (await ask(stack, "open", x_llm_d_inference_fairness_id="blue")).status_code == 200
    assert (await ask(stack, "acme-key")).status_code == 200
    assert (await ask(stack, "acme-key", x_fastserve_tenant="acme")).status_code == 200
    seen = [(submit.tenant, submit.tenant_weight) for submit in stack.scheduler.submits]
    assert seen == [("default", 1.0), ("blue", 1.0), ("acme", 2.5), ("acme", 2.5)]


@pytest.mark.parametrize("header", ["x_fastserve_tenant", "x_llm_d_inference_fairness_id"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_key_serves_no_other_tenant(stack: Stack, header: str, stream: bool) -> None:
    """Keys of tenants (aibrix #753, production-stack #759)."""
    response = await ask(stack, "acme-key", stream=stream, **{header: "other"})
    assert response.status_code == 403
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("tenant_not_allowed", header.replace("_", "-"))
    assert not stack.scheduler.submits
    outcome = {"route": CHAT, "outcome": "rejected_unauthorized"}
    assert stack.metric("fastserve_gateway_requests_total", **outcome) == 1


async def test_a_class_above_that_of_the_key_is_lowered_and_counted(stack: Stack) -> None:
    assert (await ask(stack, "acme-key", x_fastserve_class="interactive")).status_code == 200
    assert (await ask(stack, "acme-key", x_fastserve_class="batch")).status_code == 200
    assert (await ask(stack, "night")).status_code == 200
    assert (await ask(stack, "open", x_fastserve_class="interactive")).status_code == 200
    classes = [submit.service_class for submit in stack.scheduler.submits]
    assert classes == ["default", "batch", "batch", "interactive"]
    assert stack.metric("fastserve_capped_class_requests_total") == 1


# Deadlines, with a real scheduler


@pytest.fixture
async def scheduler(worker: FakeWorker) -> AsyncIterator[RunningScheduler]:
    with running_valkey() as valkey:
        async with running_scheduler(valkey, worker) as running:
            yield running


@pytest.fixture
async def served(
    scheduler: RunningScheduler, default_model_folder: Path, default_tokenizer: Tokenizer
) -> AsyncIterator[Stack]:
    """A gateway in front of the real scheduler, whose cost model has seen enough."""
    async with running_gateway(
        default_model_folder, default_tokenizer, scheduler=[scheduler.address]
    ) as running:
        assert (await complete(running, max_tokens=150)).status_code == 200
        yield running


async def complete(stack: Stack, timeout_ms: int | None = None, **fields: Any) -> httpx.Response:
    body = {"model": "fake", "prompt": "Once", "ignore_eos": True, **fields}
    headers = {} if timeout_ms is None else {"x-request-timeout-ms": str(timeout_ms)}
    return await stack.http.post("/v1/completions", json=body, headers=headers)


async def test_a_deadline_that_cannot_be_met_is_refused_at_once(
    served: Stack, scheduler: RunningScheduler, worker: FakeWorker
) -> None:
    """1900 tokens at 1 ms each, of which the scheduler believes half."""
    ran = worker.iterations
    response = await complete(served, 600, max_tokens=1900)
    assert response.status_code == 504
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("timeout", "deadline_exceeded")
    assert "cannot be met" in error["message"]
    assert worker.iterations == ran
    assert scheduler.metric("fastserve_requests_total", outcome="rejected_deadline") == 1
    # A stop string could end it early: then nothing is certain, and it may try.
    response = await complete(served, 150, max_tokens=1900, stop=["no such text"])
    assert "has passed" in response.json()["error"]["message"]


async def test_a_job_that_turns_hopeless_ends_its_stream_with_an_error(
    served: Stack, scheduler: RunningScheduler, worker: FakeWorker
) -> None:
    body = {"model": "fake", "prompt": "Once", "ignore_eos": True, "stream": True}
    body["max_tokens"] = 1900
    headers = {"x-request-timeout-ms": "3000"}
    async with served.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        assert answer.status_code == 200
        lines = [line async for line in _stalled_after(worker, answer.aiter_lines())]
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("timeout", "deadline_exceeded")
    assert "cannot be met" in error["message"], "not only at the deadline"
    assert "data: [DONE]" not in lines
    worker.gate.open()
    await eventually(lambda: worker.held == {}, "release at the worker")
    assert scheduler.metric("fastserve_requests_total", outcome="deadline") == 1


async def _stalled_after(worker: FakeWorker, lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """The lines that are not empty; from the first one on the worker stands still."""
    async for line in lines:
        worker.gate.close()
        if line:
            yield line


async def test_the_cost_model_can_be_looked_at(served: Stack, scheduler: RunningScheduler) -> None:
    (state,) = (await scheduler.snapshot()).workers
    assert 0 <= state.cost_model_error < 1
    assert state.decode_s == pytest.approx(0.001)
    assert state.prefill_tokens_per_s > 1000
    await eventually(
        lambda: (
            scheduler.metric("fastserve_predicted_decode_seconds", worker="w0")
            == pytest.approx(0.001)
        )
    )
    assert 0 <= scheduler.metric("fastserve_cost_model_error_ratio", worker="w0") < 1
    rate = scheduler.metric("fastserve_predicted_prefill_tokens_per_second", worker="w0")
    assert rate > 1000


async def test_weight_and_certain_output_survive_the_leader(worker: FakeWorker) -> None:
    worker.gate.close()
    fields: dict[str, Any] = {"tenant": "acme", "tenant_weight": 2.5, "min_output_tokens": 7}
    with running_valkey() as valkey:
        async with running_scheduler(valkey, worker) as first, connected(first.address) as gateway:
            view = await gateway.submit("a", deadline_unix_s=time.time() + 60, **fields)
            await view.accepted()
        async with running_scheduler(valkey, worker) as second:
            leader = second.service.leader
            job = leader.core.job("a") if leader is not None else None
            assert job is not None
            assert (job.spec.tenant, job.spec.tenant_weight) == ("acme", 2.5)
            assert job.spec.min_tokens == 7 and job.spec.deadline is not None
    worker.gate.open()
