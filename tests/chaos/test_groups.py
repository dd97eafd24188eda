"""SIGKILL of one component after the other, and a worker that is frozen, under twenty streams.

Two of each as processes (`support.cluster`). Clients of a gateway that dies ask the other one.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.cluster import Cluster
from support.endless_load import EndlessLoad
from support.tiny_models import tiny_model
from support.valkey import Valkey, running_valkey
from support.waiting import eventually_async

_HOLD_UP = """
import os, signal, sys, time
while True:
    os.kill(int(sys.argv[1]), signal.SIGSTOP)
    time.sleep(0.020)
    os.kill(int(sys.argv[1]), signal.SIGCONT)
    time.sleep(0.002)
"""
STREAMS = 20
TOKENS = 120


@contextlib.asynccontextmanager
async def loaded(folder: Path) -> AsyncIterator[tuple[Cluster, EndlessLoad, Valkey]]:
    model = folder / "tiny"
    tiny_model(model)
    with contextlib.ExitStack() as stack:
        valkey = stack.enter_context(running_valkey())
        flags = ("--max-num-seqs", "10")
        cluster = Cluster(folder, model, valkey, stack, pod_flags=flags, grace_s=3.0)
        load = EndlessLoad(lambda: cluster.gateways, STREAMS, TOKENS)
        try:
            await load.learn()
            async with load.running():
                yield cluster, load, valkey
            cluster.kill()
        except BaseException:
            print(cluster.logs())
            raise


async def metric(cluster: Cluster, kind: str, name: str, *labels: str) -> float:
    """Of both components of a kind together, over all series with these labels."""
    total = 0.0
    for at in range(2):
        found = await asyncio.to_thread(cluster.process(f"{kind}-{at}").metrics)
        for series, value in found.items():
            rest = series.removeprefix(name)
            if rest != series and rest[:1] in ("", "{") and all(label in rest for label in labels):
                total += value
    return total


async def fault(cluster: Cluster, kind: str) -> float:
    """Faults of workers of a kind that the schedulers have seen."""
    name = "fastserve_worker_faults_total"
    return await metric(cluster, "scheduler", name, f'kind="{kind}"')


async def leader(cluster: Cluster) -> str:
    """The scheduler that leads, alone."""
    first = await asyncio.to_thread(cluster.process("scheduler-0").metrics)
    return "scheduler-0" if first['fastserve_leader{shard="0"}'] else "scheduler-1"


def logged(cluster: Cluster) -> str:
    """By all processes, also those that are gone."""
    return "".join(path.read_text() for path in cluster.folder.rglob("*.log"))


@pytest.mark.timeout(240)
async def test_each_component_is_killed(tmp_path: Path) -> None:
    async with loaded(tmp_path) as (cluster, load, valkey):
        for names in (
            ["gateway-0"],
            [await leader(cluster)],
            ["worker-0"],
            ["sidecar-0"],
            ["worker-1", "sidecar-1"],  # a pod
        ):
            await load.rounds()
            await load.middle()
            for name in names:
                await cluster.stop(name, signal.SIGKILL)
            for name in reversed(names):
                await cluster.start(name, settle=name == names[0])
        await load.rounds()
        await load.middle()
        valkey.stop()  # SIGKILL, and all that it held is gone
        valkey.start()
        await load.rounds()
        assert load.reattached > 0, "no client lost its gateway"
        assert await metric(cluster, "gateway", "fastserve_scheduler_stream_losses") >= 1
        assert await fault(cluster, "stream_lost") >= 2
        assert await metric(cluster, "worker", "fastserve_kv_offload_losses") >= 1
        assert await metric(cluster, "scheduler", "fastserve_redis_errors_total") >= 1
        log = logged(cluster)
        for line in (
            "gateway gone",
            "no stream to the scheduler",
            '"fault": "stream_lost"',
            "kv-offload is lost",
            "redis failed: serving from memory",
        ):
            assert line in log, line


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_worker_is_frozen_for_thirty_seconds(tmp_path: Path) -> None:
    """Its connection stays; the scheduler notices that it says nothing. When it wakes up, what it
    has to say is of a stream that nobody reads."""
    async with loaded(tmp_path) as (cluster, load, _):
        await load.rounds()
        worker = cluster.pods[0].worker
        worker.process.send_signal(signal.SIGSTOP)
        began = asyncio.get_running_loop().time()
        try:

            async def noticed() -> bool:
                return await fault(cluster, "silent") >= 1

            await eventually_async(noticed, "the fault to be seen", 20)
            await load.rounds()  # all streams go on with the other one
            await asyncio.sleep(30 - (asyncio.get_running_loop().time() - began))
        finally:
            worker.process.send_signal(signal.SIGCONT)
        await eventually_async(cluster.settled, "the worker again", 30)
        await load.rounds(2)
        log = logged(cluster)
        assert '"fault": "silent"' in log and "w0 has work and said nothing for" in log


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_worker_becomes_ten_times_slower(tmp_path: Path) -> None:
    """It runs for 2 ms, less than an iteration, and stands still for 20."""
    async with loaded(tmp_path) as (cluster, load, _):
        await load.rounds()
        process = cluster.pods[0].worker.process
        name = "fastserve_worker_slowdown_ratio"

        async def slowdown() -> float:
            return await metric(cluster, "scheduler", name, 'worker="w0"')

        # A process of its own: this one is too busy to be so exact.
        holding = subprocess.Popen([sys.executable, "-c", _HOLD_UP, str(process.pid)])
        try:

            async def slow() -> bool:
                return await slowdown() >= 4

            await eventually_async(slow, "the metric", 60)
            await load.rounds()
        finally:
            holding.kill()
            holding.wait()
            process.send_signal(signal.SIGCONT)

        async def well() -> bool:
            return await slowdown() < 3

        await load.rounds()
        await eventually_async(well, "the worker as fast as before", 60)
        log = logged(cluster)
        assert "a worker is slow" in log and "a worker is no longer slow" in log
