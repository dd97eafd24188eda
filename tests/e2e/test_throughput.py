"""Two worker groups behind one scheduler share the load: all processes, a real model.

Prints what one and two groups serve (`-s`); how much that is depends on the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

from fastserve.worker.model.files import DEFAULT_MODEL, prepare
from support.cluster import Cluster
from support.endless_load import EndlessLoad
from support.valkey import running_valkey

STREAMS, ROWS = 32, 16  # one group runs half of them at once, two all
TOKENS = 64
FLAGS = (
    *("--max-num-seqs", str(ROWS), "--block-size", "16", "--max-num-batched-tokens", "256"),
    *("--dtype", "bfloat16"),
)


async def generated(cluster: Cluster, group: int) -> float:
    """Tokens by a group so far."""
    found = await asyncio.to_thread(cluster.process(f"worker-{group}").metrics)
    name = "vllm:generation_tokens_total"
    return sum(value for series, value in found.items() if series.startswith(name))


async def served(folder: Path, groups: int) -> list[float]:
    """Tokens per second of each group, with a thread each, at full load."""
    folder.mkdir()
    model = prepare(DEFAULT_MODEL)
    with contextlib.ExitStack() as stack:
        valkey = stack.enter_context(running_valkey())
        cluster = Cluster(
            folder, model, valkey, stack, pods=groups, device_blocks=400, pod_flags=FLAGS
        )
        load = EndlessLoad(lambda: cluster.gateways, STREAMS, TOKENS, model.name)
        try:
            await load.learn()
            async with load.running():
                await load.rounds()
                began = time.monotonic()
                before = [await generated(cluster, group) for group in range(groups)]
                await load.rounds(3)
                after = [await generated(cluster, group) for group in range(groups)]
                seconds = time.monotonic() - began
            cluster.kill()
        except BaseException:
            print(cluster.logs())
            raise
    return [(end - begin) / seconds for begin, end in zip(before, after, strict=True)]


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_two_groups_share_the_load(tmp_path: Path) -> None:
    for groups in (1, 2):
        rates = await served(tmp_path / str(groups), groups)
        print(f"{groups} groups: {sum(rates):.0f} tokens/s, {[round(rate) for rate in rates]}")
    assert min(rates) > 0.8 * max(rates)
