"""SIGTERM while answers stream (vllm #24885): they end or move on within `--shutdown-timeout`, with
every token, the process leaves with status 0, and whoever comes meanwhile is told to come back."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.deployment import MODEL
from support.fake_worker import FakeWorker
from support.pod import Pod
from support.processes import Running
from support.shards import gateway_process, scheduler_process
from support.streams import TIMEOUT, Answer, body_of, stream
from support.tiny_models import tiny_model
from support.valkey import Valkey
from support.waiting import eventually, eventually_async

STREAMS = 4
TOKENS = 100
SAMPLED: dict[str, Any] = {"temperature": 2.0, "top_k": 4}  # no loops, and no near ties


@pytest.fixture
async def worker() -> AsyncIterator[FakeWorker]:
    """It needs two seconds for an answer."""
    worker = FakeWorker(model=MODEL, device_blocks=512, max_model_len=4096, iteration_s=0.02)
    async with worker.serving():
        yield worker
    assert worker.violations == []


class Client:
    """Several streams to one gateway."""

    def __init__(self, http: httpx.AsyncClient, model: str) -> None:
        self.http, self.model = http, model

    def body(self, seed: int, tokens: int = TOKENS) -> dict[str, Any]:
        return body_of("Once upon a time", tokens, model=self.model, seed=seed, **SAMPLED)

    async def whole(self) -> list[str]:
        """The answers, if nothing happens."""
        answers = [stream(self.http, self.body(seed), Answer()) for seed in range(STREAMS)]
        return [answer.text for answer in await asyncio.gather(*answers)]

    def start(self) -> tuple[list[Answer], list[asyncio.Task[Answer]]]:
        answers = [Answer() for _ in range(STREAMS)]
        tasks = [
            asyncio.create_task(stream(self.http, self.body(seed), answer))
            for seed, answer in enumerate(answers)
        ]
        return answers, tasks

    async def refused(self, *codes: str) -> None:
        """A newcomer is told to come back, for one of these reasons."""

        async def once() -> bool:
            reply = await self.http.post("/v1/completions", json=self.body(99, tokens=1))
            if reply.status_code != 503:
                return False
            assert reply.json()["error"]["code"] in codes, reply.text
            assert int(reply.headers["Retry-After"]) >= 1
            return True

        await eventually_async(once, "a refusal")


@contextlib.asynccontextmanager
async def client_of(url: str, model: str = MODEL) -> AsyncIterator[Client]:
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as http:

        async def ready() -> bool:
            return (await http.get("/readyz")).status_code == 200

        await eventually_async(ready, "the gateway")
        yield Client(http, model)


async def middle(answers: list[Answer]) -> None:
    for answer in answers:
        await answer.reached(5)


def complete(answers: list[Answer], texts: list[str]) -> None:
    for answer, text in zip(answers, texts, strict=True):
        assert answer.error is None, answer.error
        assert answer.text == text
        assert answer.ids == sorted(set(answer.ids)), "a token twice"
        assert answer.usage["completion_tokens"] == TOKENS


async def left(running: Running, seconds: float) -> None:
    """The process ends by itself, with status 0, in that time."""
    code = await asyncio.to_thread(running.process.wait, seconds)
    assert code == 0, running.log.read_text()


async def test_a_gateway_finishes_its_answers(
    tmp_path: Path, valkey: Valkey, worker: FakeWorker, default_model_folder: Path
) -> None:
    with (
        scheduler_process(tmp_path, valkey, worker) as scheduler,
        gateway_process(
            tmp_path, default_model_folder, scheduler, flags=["--shutdown-timeout", "20"]
        ) as (url, gateway),
    ):
        async with client_of(url) as client:
            texts = await client.whole()
            answers, tasks = client.start()
            await middle(answers)
            worker.gate.close()
            gateway.process.send_signal(signal.SIGTERM)
            await client.refused("draining")
            assert not any(task.done() for task in tasks), "the answers were over already"
            worker.gate.open()
            await asyncio.gather(*tasks)
            complete(answers, texts)
        await left(gateway, 10)


async def test_a_gateway_does_not_wait_for_ever(
    tmp_path: Path, valkey: Valkey, worker: FakeWorker, default_model_folder: Path
) -> None:
    with (
        scheduler_process(tmp_path, valkey, worker, "--grace", "1") as scheduler,
        gateway_process(
            tmp_path, default_model_folder, scheduler, flags=["--shutdown-timeout", "0.3"]
        ) as (url, gateway),
    ):
        async with client_of(url) as client:
            answers, tasks = client.start()
            await middle(answers)
            worker.gate.close()
            gateway.process.send_signal(signal.SIGTERM)
            await asyncio.gather(*tasks)
            for answer in answers:
                assert answer.error is not None and answer.error["code"] == "draining"
                assert "X-FastServe-Answer" in answer.error["message"]
        worker.gate.open()
        await left(gateway, 10)
        # Their clients may go on elsewhere, for a while.
        await eventually(lambda: worker.held == {}, "the jobs to be cancelled")


async def test_a_scheduler_hands_its_answers_on(
    tmp_path: Path, valkey: Valkey, worker: FakeWorker, default_model_folder: Path
) -> None:
    with contextlib.ExitStack() as stack:
        leader, standby = (
            stack.enter_context(scheduler_process(tmp_path, valkey, worker)) for _ in range(2)
        )
        await leader.leading()
        url, _ = stack.enter_context(
            gateway_process(
                tmp_path,
                default_model_folder,
                *(leader, standby),
                flags=["--scheduler-timeout", "1", "--reattach-timeout", "1"],
            )
        )
        async with client_of(url) as client:
            texts = await client.whole()
            answers, tasks = client.start()
            await middle(answers)
            leader.running.process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            await left(leader.running, 10)
            await standby.leading()
            assert time.monotonic() - begun < 10, "within the default time-out"
            await asyncio.gather(*tasks)
            complete(answers, texts)
            standby.running.process.send_signal(signal.SIGTERM)
            await client.refused("draining", "scheduler_unavailable")
            await left(standby.running, 10)


@pytest.mark.parametrize("seconds", [5.0, 0.0])
async def test_a_worker_finishes_its_answers_or_another_one_does(
    tmp_path: Path, valkey: Valkey, seconds: float
) -> None:
    """With no time at all they go on where they were when the worker is back."""
    folder = tmp_path / "tiny"
    tiny_model(folder)
    with contextlib.ExitStack() as stack:
        flags = ("--shutdown-timeout", str(seconds))
        pod = Pod(tmp_path, folder, stack, device_blocks=80, host_blocks=80, worker_flags=flags)
        scheduler = stack.enter_context(scheduler_process(tmp_path, valkey, pod))
        url, _ = stack.enter_context(gateway_process(tmp_path, folder, scheduler))
        async with client_of(url, "tiny") as client:
            texts = await client.whole()
            assert len(set(texts)) == STREAMS
            answers, tasks = client.start()
            await middle(answers)
            pod.worker.process.send_signal(signal.SIGTERM)
            if seconds:
                await asyncio.gather(*tasks)
                assert pod.worker.process.poll() is None, "it left before the answers ended"
            await left(pod.worker, 15)
            await client.refused("no_workers")
            await asyncio.to_thread(pod.start_worker)
            await asyncio.gather(*tasks)
            complete(answers, texts)
