"""A worker drains while many answers stream: their KV goes to the other one through the sidecars,
little is computed again, and nobody notices."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from support.cluster import Cluster
from support.endless_load import EndlessLoad
from support.tiny_models import tiny_model
from support.valkey import running_valkey

STREAMS = 24
TOKENS = 150
WORDS = 25  # of ten bytes, each a token


async def scheduler_metrics(cluster: Cluster) -> dict[str, float]:
    """Sums over the schedulers, of which one leads."""
    total: dict[str, float] = {}
    for at in range(2):
        found = await asyncio.to_thread(cluster.running[f"scheduler-{at}"].metrics)
        for series, value in found.items():
            name = series.replace('shard="0"', "").replace(",}", "}").replace("{}", "")
            total[name] = total.get(name, 0.0) + value
    return total


@pytest.mark.timeout(240)
async def test_the_kv_of_a_draining_worker_goes_along(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    tiny_model(model)
    with contextlib.ExitStack() as stack:
        valkey = stack.enter_context(running_valkey())
        cluster = Cluster(
            tmp_path,
            model,
            valkey,
            stack,
            device_blocks=1600,
            pod_flags=("--max-num-seqs", "32"),
            scheduler_flags=("--prefix-cache", "off"),
            grace_s=20.0,
        )
        load = EndlessLoad(lambda: cluster.gateways, STREAMS, TOKENS, words=WORDS)
        try:
            await load.learn()
            async with load.running():
                await load.rounds()
                await load.middle()
                before = await scheduler_metrics(cluster)
                assert await cluster.stop("worker-0") == 0
                after = await scheduler_metrics(cluster)
                received = await asyncio.to_thread(cluster.pods[1].sidecar.metrics)
            cluster.kill()
        except BaseException:
            print(cluster.logs())
            raise

    def more(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    print({name: more(name) for name in after if "pause" in name or "export" in name})
    moved = more('fastserve_migrations_total{cause="drain"}')
    with_kv = more('fastserve_kv_exports_total{outcome="moved"}')
    recomputed = more('fastserve_kv_tokens_total{operation="recomputed"}')
    sent = more('fastserve_kv_tokens_total{operation="export"}')
    print(f"{moved=} {with_kv=} {recomputed=} {sent=}")
    assert moved >= STREAMS / 3 and with_kv >= 0.7 * moved
    assert received['fastserve_kv_tier_bytes_total{direction="in",tier="peer"}'] > 0
    # All of it would be more than the prompts.
    assert recomputed < 0.3 * moved * 10 * WORDS
    pauses = "fastserve_migration_pause_iterations"
    assert more(f"{pauses}_count") == moved
    assert more(f'{pauses}_bucket{{le="2.0"}}') == moved, "a pause of three iterations or more"
