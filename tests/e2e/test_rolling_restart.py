"""Every component is restarted in order, one at a time, while answers stream: no client loses a
token, sees one twice, or gets another one.

Two of each (gateway, scheduler, worker group with its sidecar) and one Redis, as processes. Clients
ask another gateway for the rest when theirs goes away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from support.cluster import Cluster
from support.endless_load import EndlessLoad
from support.tiny_models import tiny_model
from support.valkey import running_valkey

TOKENS = 150


async def rolling_restart(
    folder: Path, streams: int, rows: int, names: Callable[[Cluster], Sequence[str]], grace_s: float
) -> None:
    """`names`: what is restarted, in this order."""
    model = folder / "tiny"
    tiny_model(model)
    with contextlib.ExitStack() as stack:
        valkey = stack.enter_context(running_valkey())
        flags = ("--max-num-seqs", str(rows))
        cluster = Cluster(folder, model, valkey, stack, pod_flags=flags, grace_s=grace_s)
        load = EndlessLoad(lambda: cluster.gateways, streams, TOKENS)
        try:
            await load.learn()
            async with load.running():
                for name in names(cluster):
                    await load.middle()
                    if name == "redis":
                        valkey.stop()
                        valkey.start()
                    else:
                        assert await cluster.stop(name) == 0, name
                        await cluster.start(name)
                    await load.rounds()
            cluster.kill()
        except BaseException:
            print(cluster.logs())
            raise
        # Whoever came while a gateway ended was told so; nobody ever found no worker.
        assert set(load.refused) <= {"draining"}, load.refused
        leaving = [pod.worker for pod in cluster.pods]
        for worker in leaving:
            assert "leaving before all jobs were taken away" not in worker.log.read_text()


@pytest.mark.timeout(240)
async def test_one_of_each_is_restarted(tmp_path: Path) -> None:
    kinds = ("gateway-0", "scheduler-0", "worker-0", "sidecar-0", "redis")
    await rolling_restart(tmp_path, 8, 4, lambda _: kinds, grace_s=4.0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_fifty_streams_through_two_rolling_restarts(tmp_path: Path) -> None:
    await rolling_restart(
        tmp_path, 50, 32, lambda cluster: [*cluster.components, "redis"] * 2, grace_s=30.0
    )
