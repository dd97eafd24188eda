"""Schedulers with standbys and several shards, as processes, around workers that answer exactly.

The workers live in the test: what they sample depends on seed and position alone, so a text says
whether a token was lost, repeated or changed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from support.deployment import MODEL
from support.fake_worker import FakeWorker, expected_tokens
from support.gateway_client import connected
from support.processes import Running
from support.shards import SchedulerProcess, gateway_process, scheduler_process
from support.streams import TIMEOUT, Answer, body_of, stream
from support.valkey import Valkey, running_valkey
from support.waiting import eventually

STREAMS = 20
TOKENS = 120
TAKEOVER_S = 3.0


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with running_valkey() as server:
        yield server


@contextlib.asynccontextmanager
async def fake_worker(worker_id: str = "w0") -> AsyncIterator[FakeWorker]:
    worker = FakeWorker(
        worker_id=worker_id,
        model=MODEL,
        device_blocks=4096,
        max_num_seqs=STREAMS,
        max_num_batched_tokens=256,
        max_model_len=4096,
        iteration_s=0.02,
    )
    async with worker.serving():
        yield worker
    assert worker.violations == []


@pytest.fixture
async def worker() -> AsyncIterator[FakeWorker]:
    async with fake_worker() as worker:
        yield worker


class Load:
    """Streamed answers, all of them different, under way together."""

    def __init__(self, http: httpx.AsyncClient, count: int = STREAMS, tokens: int = TOKENS) -> None:
        self.answers = [Answer() for _ in range(count)]
        self.bodies = [body_of("Once", tokens, seed=seed) for seed in range(count)]
        self.tokens = tokens
        self.tasks = [
            asyncio.ensure_future(stream(http, body, answer))
            for body, answer in zip(self.bodies, self.answers, strict=True)
        ]

    async def reached(self, pieces: int) -> None:
        for answer in self.answers:
            await answer.reached(pieces)

    async def done(self) -> list[str]:
        """Texts, once all of them ended well: every token once."""
        await asyncio.gather(*self.tasks)
        for answer in self.answers:
            assert answer.error is None, answer.error
            assert answer.usage["completion_tokens"] == self.tokens
            assert answer.ids == sorted(set(answer.ids)), "a token twice"
        return [answer.text for answer in self.answers]

    def in_shard(self, shard: str) -> list[Answer]:
        return [answer for answer in self.answers if answer.response_id.endswith(f"-{shard}")]


def client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT)


async def ready(url: str) -> None:
    async with client(url) as http:
        for _ in range(500):
            if (await http.get("/readyz")).status_code == 200:
                return
            await asyncio.sleep(0.02)
    raise AssertionError(f"{url} is not ready")


async def test_a_standby_takes_over_twenty_streams(
    tmp_path: Path, valkey: Valkey, worker: FakeWorker, default_model_folder: Path
) -> None:
    with contextlib.ExitStack() as stack:
        leader, standby = (
            stack.enter_context(scheduler_process(tmp_path, valkey, worker)) for _ in range(2)
        )
        await leader.leading()
        url, _ = stack.enter_context(
            gateway_process(tmp_path, default_model_folder, leader, standby)
        )
        await ready(url)
        async with client(url) as http:
            undisturbed = await Load(http).done()
            load = Load(http)
            await load.reached(TOKENS // 4)
            leader.kill()
            assert await standby.leading() < TAKEOVER_S
            assert await load.done() == undisturbed
    # Nothing that a worker still held was computed again.
    assert sum(worker.prefilled.values()) < 2 * STREAMS * 10


@pytest.mark.parametrize("fence", ["worker", "redis"])
async def test_a_leader_that_was_stopped_and_goes_on_is_fenced(
    tmp_path: Path, valkey: Valkey, worker: FakeWorker, fence: str
) -> None:
    """It has a worker in common with the next one, which refuses it, or only Redis."""
    async with contextlib.AsyncExitStack() as stack:
        following = worker
        if fence == "redis":
            following = await stack.enter_async_context(fake_worker("w1"))
        old = stack.enter_context(scheduler_process(tmp_path, valkey, worker))
        await old.leading()
        new = stack.enter_context(scheduler_process(tmp_path, valkey, following))
        async with connected(old.address) as before:
            await eventually(lambda: before.welcome.ready, "the worker's stream")
            seen = await before.submit("a", seed=1, max_tokens=400)
            await seen.at_least(20)
            old.pause()
            assert await new.leading() < TAKEOVER_S
            async with connected(new.address) as after:
                epoch = after.welcome.epoch
                assert epoch > before.welcome.epoch
                first = len(seen.tokens)
                rest = await after.attach("a", first)
                await rest.at_least(20)
                plans = len(following.plans)
                old.go_on()
                await old.says("another scheduler leads: stepping down")
                await rest.finished()
                assert seen.tokens[:first] + rest.tokens == expected_tokens(1, 400)
            # What the old one may still have said was right, and came in order.
            assert seen.tokens == expected_tokens(1, 400)[: len(seen.tokens)]
        assert not await old.leads()
        assert await old.metric("fastserve_leader") == 0
        if fence == "redis":
            assert await old.metric("fastserve_redis_errors_total", kind="fenced") >= 1
        assert {plan.scheduler_epoch for plan in following.plans[plans:]} == {epoch}
        async with Redis.from_url(valkey.url, decode_responses=True) as redis:
            assert await redis.get("fastserve:{0}:epoch") == str(epoch)
            assert str(await redis.get("fastserve:{0}:lease")).startswith(f"{epoch} ")
            log = str(await redis.get("fastserve:{0}:log:a"))
            assert [int(token) for token in log.split(",")[:-1]] == expected_tokens(1, 400)
        # It stands by, and leads again when it is its turn.
        new.kill()
        await old.leading()


@contextlib.asynccontextmanager
async def two_shards(
    tmp_path: Path, valkey: Valkey, model: Path, gateways: int
) -> AsyncIterator[tuple[list[SchedulerProcess], list[str], list[Running]]]:
    """Leaders of the shards a and b and a standby of a; URLs of gateways, and their processes."""
    async with fake_worker("wa") as first, fake_worker("wb") as second:
        with contextlib.ExitStack() as stack:
            schedulers = []
            for shard, worker in (("a", first), ("b", second), ("a", first)):
                process = stack.enter_context(
                    scheduler_process(tmp_path, valkey, worker, shard=shard)
                )
                schedulers.append(process)
                if len(schedulers) <= 2:
                    await process.leading()
            started = [
                stack.enter_context(gateway_process(tmp_path, model, *schedulers))
                for _ in range(gateways)
            ]
            urls = [url for url, _ in started]
            for url in urls:
                await _sees(url, ["a", "b"])
            yield schedulers, urls, [process for _, process in started]


async def _sees(url: str, shards: Sequence[str]) -> None:
    async with client(url) as http:
        for _ in range(500):
            text = (await http.get("/metrics")).text
            if all(f'fastserve_scheduler_ready{{shard="{name}"}} 1.0' in text for name in shards):
                return
            await asyncio.sleep(0.02)
    raise AssertionError(f"{url} does not see {shards}")


async def test_a_dead_leader_disturbs_its_own_shard_only(
    tmp_path: Path, valkey: Valkey, default_model_folder: Path
) -> None:
    async with two_shards(tmp_path, valkey, default_model_folder, 1) as (schedulers, urls, _):
        leader, other, standby = schedulers
        async with client(urls[0]) as http:
            undisturbed = await Load(http).done()
            load = Load(http, tokens=TOKENS)
            await load.reached(20)
            spread = Counter(answer.response_id.rsplit("-", 1)[1] for answer in load.answers)
            assert min(spread["a"], spread["b"]) >= STREAMS // 2 - 2, spread
            leader.kill()
            for answer in load.in_shard("b"):  # before anybody leads the other shard again
                await answer.reached(60)
            assert not await standby.leads()
            assert all(len(answer.pieces) < 60 for answer in load.in_shard("a"))
            await standby.leading()
            assert await load.done() == undisturbed
        assert await other.metric("fastserve_leader", shard="b") == 1
        assert '"shard": "b"' in other.log
        assert all('"shard": "b"' in line for line in other.log.splitlines() if "gateway" in line)


async def test_another_gateway_finds_the_shard_of_an_answer(
    tmp_path: Path, valkey: Valkey, default_model_folder: Path
) -> None:
    async with two_shards(tmp_path, valkey, default_model_folder, 2) as (_, urls, gateways):
        async with client(urls[0]) as http:
            undisturbed = await Load(http, count=2).done()
            load = Load(http, count=2)
            await load.reached(20)
            assert load.in_shard("a") and load.in_shard("b")
            gateways[0].kill()
            cut = await asyncio.gather(*load.tasks, return_exceptions=True)
            assert all(isinstance(error, httpx.TransportError) for error in cut)
        async with client(urls[1]) as http:
            for body, begun, text in zip(load.bodies, load.answers, undisturbed, strict=True):
                resume = {
                    "X-FastServe-Answer": begun.response_id,
                    "Last-Event-ID": str(begun.ids[-1]),
                }
                rest = await stream(http, body, Answer(), headers=resume)
                assert begun.text + rest.text == text
                assert rest.response_id == begun.response_id
            for unknown in ("cmpl-" + 32 * "0" + "-a", "cmpl-" + 32 * "0" + "-c"):
                reply = await http.post(
                    "/v1/completions", json=body, headers={"X-FastServe-Answer": unknown}
                )
                assert reply.status_code == 404
                assert reply.json()["error"]["code"] == "answer_not_found"
