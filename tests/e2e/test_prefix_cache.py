"""Requests that begin alike: the second computes less, says so, and gives the same text."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from support.deployment import Deployment, deployment
from support.streams import TIMEOUT, Answer, body_of, stream
from support.waiting import eventually

PREFIX = "The harbour of the small town had been built for fishing boats. " * 30
KEYS = "sk-one tenant=one\nsk-too tenant=one\nsk-two tenant=two\n"


async def ask(running: Deployment, key: str, prompt: str, tokens: int = 24) -> Answer:
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT, headers=headers) as client:
        answer = await stream(client, body_of(prompt, tokens), Answer())
    assert answer.error is None and answer.usage["completion_tokens"] == tokens
    return answer


def cached(answer: Answer) -> int:
    found: int = answer.usage["prompt_tokens_details"]["cached_tokens"]
    return found


async def counted(running: Deployment, tokens: int) -> None:
    """The scheduler, which shows its counts from time to time, comes to the same."""
    await eventually(
        lambda: (
            running.metric("scheduler", "fastserve_kv_tokens_total", operation="cached") == tokens
        ),
        f"{tokens} cached tokens",
    )


@pytest.mark.parametrize("scope", ["tenant", "off"])
async def test_a_second_request_with_the_same_beginning(tmp_path: Path, scope: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    flags = ("--prefix-cache", scope, "--api-key-file", str(keys), "--kv-blocks", "128")
    with deployment(tmp_path / "state", *flags) as running:
        first = await ask(running, "sk-one", PREFIX)
        again = await ask(running, "sk-too", PREFIX)  # of the same tenant
        other = await ask(running, "sk-two", PREFIX)
        longer = await ask(running, "sk-one", PREFIX + first.text + " And then")
        prompt = first.usage["prompt_tokens"]
        assert first.text == again.text == other.text
        assert (cached(first), cached(other)) == (0, 0)
        if scope == "tenant":
            assert cached(again) == (prompt - 1) // 16 * 16
            assert cached(longer) >= cached(again)  # and part of the first answer, as a rule
        else:
            assert (cached(again), cached(longer)) == (0, 0)
        hits = sum(map(cached, (first, again, other, longer)))
        assert running.metric("worker", "fastserve_prefix_cache_hits_total") == hits
        assert running.metric("worker", "vllm:prefix_cache_hits_total") == hits
        await counted(running, hits)
        # Nothing is held any more: what the cache keeps counts as free.
        await eventually(lambda: running.metric("worker", "vllm:kv_cache_usage_perc") == 0)


async def test_prompts_that_the_device_gave_up_come_from_the_host(tmp_path: Path) -> None:
    """The device has room for one prompt and a bit; two take turns."""
    flags = ("--kv-blocks", "32", "--host-memory", "200M", "--prefix-cache", "all")
    prompts = [f"Chapter {number}. " + PREFIX[:1900] for number in range(2)]
    with deployment(tmp_path / "state", *flags) as running:
        first, blocks = [], 0
        for prompt in prompts:
            first.append(await ask(running, "any", prompt, 4))
            usage = first[-1].usage
            blocks += usage["prompt_tokens"] // 16
            assert usage["total_tokens"] // 16 == usage["prompt_tokens"] // 16  # none of answers

            def saved(blocks: int = blocks) -> bool:
                slots = running.metric("kv-offload", "fastserve_host_kv_slots", state="cached")
                return slots == blocks

            await eventually(saved, f"{blocks} blocks on the host")
        again = [await ask(running, "any", prompt, 4) for prompt in prompts]
        assert [answer.text for answer in again] == [answer.text for answer in first]
        full = [(answer.usage["prompt_tokens"] - 1) // 16 * 16 for answer in first]
        assert list(map(cached, first)) == [0, 0]
        assert list(map(cached, again)) == full
        hits = {
            tier: running.metric("worker", "fastserve_prefix_cache_hits_total", tier=tier)
            for tier in ("device", "host")
        }
        assert hits["host"] > sum(full) / 2 and sum(hits.values()) == sum(full)
        assert running.metric("worker", "vllm:prefix_cache_hits_total") == sum(full)
        await counted(running, sum(full))
