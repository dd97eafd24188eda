"""`fastserve up` with a group of ranks: one of them is killed while answers stream."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import psutil
import pytest

from support.deployment import deployment
from support.streams import TIMEOUT, Answer, body_of, stream
from support.waiting import eventually

PROMPTS = ("A short history of the lighthouse:\n", "Notes on keeping bees in winter:\n", "Why?")
# Two rows for three answers, and blocks for little more.
FLAGS = (
    *("--dtype", "float32", "--threads", "1", "--max-num-seqs", "2"),
    *("--kv-blocks", "14", "--host-kv-blocks", "80"),
)
TP_3, PP_2 = ("--tensor-parallel-size", "3"), ("--pipeline-parallel-size", "2")
TOKENS = 90


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("shape", [TP_3, PP_2])
async def test_streams_go_on_after_a_rank_was_killed(
    tmp_path: Path, shape: tuple[str, str]
) -> None:
    bodies = [body_of(prompt, TOKENS) for prompt in PROMPTS]
    with deployment(tmp_path, *FLAGS, *shape) as running:
        async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT) as client:
            expected = await asyncio.gather(*(stream(client, body, Answer()) for body in bodies))
            launcher = psutil.Process(running.service("worker")["pid"])
            ranks = launcher.children()
            assert len(ranks) == int(shape[1])
            answers = [Answer() for _ in bodies]
            async with asyncio.TaskGroup() as tasks:
                for body, answer in zip(bodies, answers, strict=True):
                    tasks.create_task(stream(client, body, answer))
                await asyncio.gather(*(answer.reached(10) for answer in answers[:2]))
                ranks[-1].kill()
                gone = asyncio.to_thread(psutil.wait_procs, [launcher, *ranks], 20.0)
                assert not (await gone)[1], "the group outlives its rank"
                assert not all(answer.ended for answer in answers), "killed too late"
        for answer, whole in zip(answers, expected, strict=True):
            assert answer.error is None, answer.error
            assert answer.text == whole.text
            assert answer.usage["completion_tokens"] == TOKENS
            assert answer.ids == sorted(set(answer.ids)), "a token twice"
        await eventually(lambda: running.restarted("worker"), "the group again", timeout=60.0)
        assert running.metric("worker", "fastserve_comm_seconds_count", kind="plan") > 0
