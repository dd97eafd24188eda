"""SIGKILL of the worker, of its sidecar, and of both, under load: no token lost, repeated or
different, and no block left behind anywhere.

The worker, the sidecar (with a disk) and Redis are processes, the scheduler is the real service in
the process of the test, which takes the tokens as a gateway does. Sampling is seeded, not greedy: a
random model repeats itself when it is greedy, and a lost token would not show. It is of a few
tokens: the edges between many are so close that rounding in another batch may step over one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.gateway_client import GatewayClient, JobView, connected
from support.pod import Pod
from support.schedulers import RunningScheduler, running_scheduler
from support.tiny_models import VOCAB, tiny_model
from support.valkey import running_valkey
from support.waiting import eventually, eventually_async

STREAMS = 20
TOKENS = 60
# A job grows to 10 or 11 blocks. Two fit on the device, four on the host, the others on the disk.
DEVICE, HOST, DISK = 24, 40, 160
VICTIMS = ("worker", "sidecar", "both")
END_S = 60.0  # for a load and a restart


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(folder)
    return folder


def prompt_of(stream: int) -> list[int]:
    numbers = random.Random(stream)
    return [numbers.randrange(2, VOCAB) for _ in range(numbers.randint(12, 24))]


class System:
    """What is killed, and what is asked."""

    def __init__(self, pod: Pod, scheduler: RunningScheduler, gateway: GatewayClient) -> None:
        self.pod, self.scheduler, self.gateway = pod, scheduler, gateway

    async def submit(self, name: str, stream: int) -> JobView:
        view = await self.gateway.submit(
            name,
            prompt=prompt_of(stream),
            seed=stream,
            max_tokens=TOKENS,
            sampling={"temperature": 2.0, "top_k": 4, "ignore_eos": True},
        )
        return await view.accepted()

    async def alone(self) -> list[list[int]]:
        """What each stream is when nothing else is there."""
        texts = []
        for stream in range(STREAMS):
            view = await self.submit(f"alone-{stream}", stream)
            texts.append((await view.finished()).tokens)
        return texts

    async def kill(self, victim: str) -> None:
        """SIGKILL, and start anew at once; returns when all are ready."""
        pod = self.pod
        dead = [pod.worker] * (victim != "sidecar") + [pod.sidecar] * (victim != "worker")
        for running in dead:
            running.process.kill()
        for running in dead:
            await asyncio.to_thread(running.process.wait, 30)
        if victim != "worker":
            await asyncio.to_thread(pod.start_sidecar)
        if victim != "sidecar":
            await asyncio.to_thread(pod.start_worker)

    async def empty(self) -> bool:
        """No job and no block anywhere, in everybody's own count."""
        snapshot = await self.scheduler.snapshot()
        (worker,) = snapshot.workers
        stats = await self.pod.stats()
        usage = {name: value for name, value in self.pod.metrics().items() if "usage" in name}
        return (
            not snapshot.jobs
            and worker.free_device_blocks == DEVICE
            and worker.free_host_blocks == worker.host_blocks > 0
            and (stats.jobs, stats.committed_slots, stats.reserved_slots) == (0, 0, 0)
            and (stats.free_slots, stats.free_disk_slots) == (HOST, stats.disk_slots)
            and stats.disk_blocks == 0
            and set(usage.values()) == {0.0}
        )


@contextlib.asynccontextmanager
async def running(folder: Path, model: Path) -> AsyncIterator[System]:
    with contextlib.ExitStack() as stack:
        valkey = stack.enter_context(running_valkey())
        pod = Pod(folder, model, stack, DEVICE, HOST, DISK)
        # Restarts keep the machine busy: the lease must not end by that.
        async with (
            running_scheduler(
                valkey, pod.address, policy="skip-join-mlfq", leader_ttl=30.0, redis_timeout=5.0
            ) as scheduler,
            connected(scheduler.address) as gateway,
        ):
            await eventually(lambda: gateway.welcome.ready, "the worker's stream")
            yield System(pod, scheduler, gateway)


async def one_load(system: System, victim: str, name: str, after: int) -> list[JobView]:
    """All streams at once; the victim dies when they have so many tokens together."""
    views = [await system.submit(f"{name}-{stream}", stream) for stream in range(STREAMS)]
    await eventually(lambda: sum(len(view.tokens) for view in views) >= after, "tokens", END_S)
    assert any(not view.finish for view in views), "too late"
    await system.kill(victim)
    for view in views:
        await view.finished(END_S)
    return views


async def check(folder: Path, model: Path, rounds: int, seed: int) -> None:
    numbers = random.Random(seed)
    async with running(folder, model) as system:
        expected = await system.alone()
        assert len({tuple(text) for text in expected}) == STREAMS
        await eventually_async(system.empty, "empty pools before the first kill")
        moved = 0
        for round_ in range(rounds):
            for victim in VICTIMS:
                after = numbers.randint(STREAMS, STREAMS * TOKENS * 3 // 4)
                what = f"round {round_}, {victim} after {after} tokens"
                views = await one_load(system, victim, f"{round_}-{victim}", after)
                for stream, view in enumerate(views):
                    assert not view.error, f"{what}: {view.error}"
                    assert view.tokens == expected[stream], f"{what}: stream {stream}"
                moved += (await system.pod.stats()).committed_bytes_total > 0
                await eventually_async(system.empty, f"empty pools after {what}")
        assert moved, "no KV cache was ever moved"


async def test_two_rounds_of_kills(tmp_path: Path, model: Path) -> None:
    await check(tmp_path, model, rounds=2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_twenty_rounds_of_kills(tmp_path: Path, model: Path) -> None:
    await check(tmp_path, model, rounds=20, seed=2)
