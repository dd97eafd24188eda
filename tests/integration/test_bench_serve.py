"""`fastserve bench serve` as a process, against the real gateway with a scripted scheduler."""

from __future__ import annotations

import asyncio
import csv
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fastserve.gateway.tokenizer import Tokenizer
from fastserve.proto.v1 import sampling_pb2, scheduler_pb2
from support.fake_scheduler import Refusal, Script, Stack, running_gateway
from support.waiting import eventually

LENGTHS = ("--prompt-tokens", "44", "--output-tokens", "9", "--ignore-eos")


@pytest.fixture
async def stack(default_model_folder: Path, default_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    async with running_gateway(default_model_folder, default_tokenizer) as stack:
        stack.scheduler.reply = as_asked
        yield stack


def as_asked(submit: scheduler_pb2.Submit) -> Script:
    """Ordinary words, as many as the request wants."""
    count = submit.sampling.max_tokens
    return Script(tokens=[1000] * count, finish=sampling_pb2.FINISH_REASON_LENGTH)


async def start(stack: Stack, *flags: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fastserve.cli", "bench", "serve", stack.url, "--json", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[list[dict[str, Any]], str]:
    """Its reports, and what it said."""
    async with asyncio.timeout(60):
        output, said = await process.communicate()
    return [json.loads(line) for line in output.splitlines()], said.decode()


async def bench(stack: Stack, *flags: str) -> tuple[int, list[dict[str, Any]], str]:
    process = await start(stack, *flags)
    found, said = await ended(process)
    assert process.returncode is not None
    return process.returncode, found, said


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_lengths_are_exact_and_rates_make_a_sweep(
    stack: Stack, endpoint: str, tmp_path: Path
) -> None:
    status, found, said = await bench(
        stack, *LENGTHS, "-r", "40,80", "-n", "12", "--endpoint", endpoint, "--out", str(tmp_path)
    )
    assert status == 0, said
    assert [one["rate"] for one in found] == [40, 80]
    for one in found:
        assert (one["requests"], one["failed"], one["output_tokens"]) == (12, 0, 12 * 9)
        assert one["exact_prompts"] == one["made_prompts"] == 12
        assert one["prompt_tokens"] == 12 * 44
        assert one["without_usage"] == one["shorter_than_asked"] == 0
    # What the scheduler got: one to measure with, a warm-up, and two runs of the same requests.
    prompts = [tuple(submit.prompt_token_ids) for submit in stack.scheduler.submits]
    assert len(prompts) == 2 + 24 and sorted(prompts[2:14]) == sorted(prompts[14:])
    assert {len(prompt) for prompt in prompts[1:]} == {44} and len(set(prompts[2:14])) == 12
    with (tmp_path / "runs.csv").open() as file:
        assert [row["rate"] for row in csv.DictReader(file)] == ["40.0", "80.0"]
    assert (tmp_path / "load.png").exists() and (tmp_path / "load.svg").exists()


async def test_refused_requests_are_failures_and_miss_the_slo(stack: Stack) -> None:
    answered = 0

    def full_from_the_fifth_on(submit: scheduler_pb2.Submit) -> Script | Refusal:
        nonlocal answered
        answered += 1
        if answered > 2 + 4:  # after one to measure with, and the warm-up
            return Refusal(scheduler_pb2.REJECT_REASON_QUEUE_FULL, "the queue is full", 1)
        return as_asked(submit)

    stack.scheduler.reply = full_from_the_fifth_on
    status, (found,), said = await bench(
        stack, *LENGTHS, "-c", "1", "-n", "10", "--slo-ttft", "60", "--slo-tpot", "60"
    )
    assert status == 0
    assert (found["failed"], found["slo_attainment"]) == (6, 0.4)
    assert found["errors"] == {"HTTP 429: the queue is full": 6}
    assert "6 of 10 requests failed" in said


async def test_nothing_but_failures_is_status_1(stack: Stack) -> None:
    stack.scheduler.reply = Refusal(scheduler_pb2.REJECT_REASON_QUEUE_FULL, "the queue is full", 1)
    status, found, said = await bench(stack, *LENGTHS, "-n", "2")
    assert status == 1 and not found and "the queue is full" in said


async def test_ctrl_c_reports_what_has_ended(stack: Stack) -> None:
    gate = asyncio.Event()

    def second_half_hangs(submit: scheduler_pb2.Submit) -> Script:
        script = as_asked(submit)
        if len(stack.scheduler.submits) > 2 + 5:
            script.gate = gate
        return script

    stack.scheduler.reply = second_half_hangs
    process = await start(stack, *LENGTHS, "-c", "2", "-n", "20")
    # Both clients hang, so whatever was before has ended for them.
    await eventually(lambda: len(stack.scheduler.submits) == 2 + 7, timeout=60)
    process.send_signal(signal.SIGINT)
    (found,), said = await ended(process)
    assert process.returncode == 130
    assert (found["requests"], found["unfinished"], found["not_sent"]) == (5, 2, 13)
    assert found["failed"] == 0 and "interrupted" in said
    await eventually(lambda: len(stack.scheduler.cancelled) == 2)


async def test_headers_and_real_prompts(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Name a colour.", "output_tokens": 3}\n')
    status, (found,), said = await bench(
        stack,
        *("--prompts", str(file), "-c", "1", "-n", "4", "--tenants", "3", "--warmup", "0"),
        *("--service-class", "batch", "--header", "X-Request-Id: mine"),
    )
    assert status == 0, said
    assert found["output_tokens"] == 12 and found["workload"] == "prompts.jsonl"
    submits = stack.scheduler.submits
    assert len({tuple(submit.prompt_token_ids) for submit in submits}) == 1
    assert {submit.service_class for submit in submits} == {"batch"}
    assert {submit.tenant for submit in submits} <= {"tenant-1", "tenant-2", "tenant-3"}
