"""Processes are killed while answers stream: that may cost a pause, but never a token."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from support.deployment import Deployment, deployment
from support.streams import TIMEOUT, Answer, body_of, stream
from support.waiting import eventually

pytestmark = pytest.mark.timeout(300)  # the first test starts everything

TOKENS = 70
# One row and room for one and a half jobs: the two answers take turns, and their KV moves.
FLAGS = ("--kv-blocks", "9", "--max-num-seqs", "1", "--host-kv-blocks", "40")
STANDBY = ("--scheduler-replicas", "2")
PROMPTS = ("A short history of the lighthouse:\n", "Notes on keeping bees in winter:\n")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("faults"), *FLAGS, *STANDBY) as system:
        yield system


@pytest.fixture(scope="module")
def expected(running: Deployment) -> list[str]:
    """What the answers are when nothing happens."""

    async def ask() -> list[str]:
        async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT) as client:
            return [
                (await stream(client, body_of(prompt, TOKENS), Answer())).text for prompt in PROMPTS
            ]

    return asyncio.run(ask())


@pytest.mark.parametrize("victim", ["worker", "kv-offload", "leader", "valkey"])
async def test_a_kill_costs_a_pause_and_nothing_else(
    running: Deployment, expected: list[str], victim: str
) -> None:
    """llm-d-router #2345, production-stack PR #643: streams that end with their engine."""
    if victim == "leader":
        victim = running.leader()
    restarts = running.service(victim)["restarts"]
    answers = [Answer() for _ in PROMPTS]
    async with (
        httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT) as client,
        asyncio.TaskGroup() as tasks,
    ):
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            tasks.create_task(stream(client, body_of(prompt, TOKENS), answer))
        # Both have begun, so one of them is preempted when the process dies.
        await answers[0].reached(15)
        await answers[1].reached(5)
        running.kill(victim)
    for answer, text in zip(answers, expected, strict=True):
        assert answer.error is None, answer.error
        assert answer.text == text
        assert answer.usage["completion_tokens"] == TOKENS
        assert answer.ids == sorted(set(answer.ids)), "a token twice"
    await eventually(
        lambda: running.restarted(victim, restarts + 1), f"{victim} again", timeout=40.0
    )


async def test_a_stream_goes_on_after_its_gateway_was_killed(
    running: Deployment, expected: list[str]
) -> None:
    url, restarts = running.url, running.service("gateway")["restarts"]
    begun, body = Answer(), body_of(PROMPTS[0], TOKENS)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
        cut = asyncio.create_task(stream(client, body, begun))
        await begun.reached(10)
        running.kill("gateway")
        with pytest.raises(httpx.TransportError):
            await cut
    await eventually(lambda: running.restarted("gateway", restarts + 1), "gateway", timeout=40.0)
    # The same request once more, with the id of the answer and the last event that came.
    resume = {"X-FastServe-Answer": begun.response_id, "Last-Event-ID": str(begun.ids[-1])}
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
        rest = await stream(client, body, Answer(), headers=resume)
        assert begun.text + rest.text == expected[0]
        assert rest.ids[0] > begun.ids[-1] and rest.response_id == begun.response_id
        assert rest.usage["completion_tokens"] == TOKENS
        unknown = await client.post(
            "/v1/completions", json=body, headers={"X-FastServe-Answer": "cmpl-" + 32 * "0" + "-0"}
        )
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "answer_not_found"
