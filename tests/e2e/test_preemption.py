"""A burst of short requests behind a long one, with KV memory for one and a half jobs.

With a preemptive policy the burst overtakes the long answer, whose KV cache is moved to host memory
and back, for which no flag is needed (vllm #19854); its text must not change by that. With FCFS the
burst waits for it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from support.deployment import Deployment, deployment
from support.streams import TIMEOUT, Answer, body_of, stream

LONG_TOKENS = 130
SHORTS = 4
# 11 blocks of 16 tokens: the long job grows to 10, a short one has 7.
SIZES = ("--kv-blocks", "11", "--max-num-seqs", "1", "--host-kv-blocks", "64")
FLAGS = (*SIZES, "--dtype", "bfloat16")
BLOCK_BYTES = 30 * 2 * 3 * 16 * 64 * 2  # layers, K and V, KV heads, tokens, head dimension, bf16
LONG = "Write a long story about a lighthouse keeper and his daughter.\n\n"
SHORT = "The harbour of the small town had been built for fishing boats. " * 6


async def _alone(running: Deployment) -> Answer:
    async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT) as client:
        return await stream(client, body_of(LONG, LONG_TOKENS), Answer())


async def _burst(running: Deployment) -> tuple[Answer, list[Answer]]:
    """The long one and, after a while, the short ones."""
    async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT) as client:
        long, shorts = Answer(), [Answer() for _ in range(SHORTS)]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(stream(client, body_of(LONG, LONG_TOKENS), long))
            await long.reached(60)
            for number, short in enumerate(shorts):
                tasks.create_task(stream(client, body_of(f"{number}. {SHORT}", 4), short))
    for answer in (long, *shorts):
        assert answer.error is None and answer.finish == "length"
    assert long.usage["completion_tokens"] == LONG_TOKENS
    return long, shorts


@pytest.mark.parametrize("policy", ["fastserve", "skip-join-mlfq"])
async def test_a_burst_overtakes_a_long_answer(tmp_path: Path, policy: str) -> None:
    with deployment(tmp_path, *FLAGS, "--policy", policy) as running:
        alone = await _alone(running)
        long, shorts = await _burst(running)
        assert all(short.ended < long.ended for short in shorts), "the burst waited"
        assert long.text == alone.text, "preemption changed the text"
        assert long.ids == sorted(set(long.ids)), "a token twice"

        bytes_out = running.metric(
            "kv-offload", "fastserve_kv_tier_bytes_total", tier="host", direction="out"
        )
        bytes_in = running.metric(
            "kv-offload", "fastserve_kv_tier_bytes_total", tier="host", direction="in"
        )
        # At least what the long job had computed when it was preempted.
        assert bytes_out >= 4 * BLOCK_BYTES and bytes_out % BLOCK_BYTES == 0
        assert bytes_in >= 4 * BLOCK_BYTES and bytes_in % BLOCK_BYTES == 0
        assert running.metric("worker", "fastserve_swap_bytes_total", direction="out") == bytes_out
        preempted = running.metric("scheduler", "fastserve_request_preemptions_sum")
        assert preempted >= 1


async def test_with_fcfs_the_burst_waits(tmp_path: Path) -> None:
    with deployment(tmp_path, *FLAGS, "--policy", "fcfs") as running:
        long, shorts = await _burst(running)
        # The last token of the long one and the first of the next may come in one read.
        assert all(short.first > long.ended - 0.5 for short in shorts), "no head-of-line blocking?"
        assert running.metric("scheduler", "fastserve_request_preemptions_sum") == 0
