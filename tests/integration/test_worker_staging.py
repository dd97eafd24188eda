"""The real worker and the real kv-offload process: KV goes to host memory and comes back, and what
dies in between costs time, never tokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fastserve.common.rpc import channel
from fastserve.proto.v1 import sampling_pb2, worker_pb2, worker_pb2_grpc
from support.pod import Pod, beginnings_come_from_the_host
from support.tiny_models import EOS, VOCAB, tiny_model
from support.waiting import eventually_async
from support.worker_driver import (
    COPY_OUT,
    DROP_DEVICE,
    LOST,
    NO_HOST_SPACE,
    OFFLOAD,
    OK,
    RELEASE,
    UPLOAD,
    WorkerDriver,
    worker_driver,
)

BLOCK = Pod.block  # tokens
DEVICE_BLOCKS = 12
HOST_BLOCKS = 16
PROMPT = [17, 250, 99, 4, 31, 8, 77, 123, 54, 200, 201, 5, 61, 300, 19, 44, 72, 90, 11]
BLOCK_BYTES = Pod.block_bytes
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 1234, "top_p": 0.95}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """For tests that kill nothing and release their jobs."""
    with contextlib.ExitStack() as stack:
        yield Pod(tmp_path_factory.mktemp("pod"), model, stack, DEVICE_BLOCKS, HOST_BLOCKS)


@pytest.fixture
def pod(model: Path, tmp_path: Path) -> Iterator[Pod]:
    with contextlib.ExitStack() as stack:
        yield Pod(tmp_path, model, stack, DEVICE_BLOCKS, HOST_BLOCKS)


async def undisturbed(pod: Pod, count: int) -> list[int]:
    """What the job gives when it runs alone, with its whole prompt in one piece."""
    async with pod.driver() as driver:
        alone = driver.job("alone", PROMPT, **SAMPLED)
        tokens = list(await driver.generate(alone, count, chunk=64))
        await driver.op(RELEASE, alone)
        return tokens


# --- one life ------------------------------------------------------------------------------------


async def test_kv_goes_out_and_comes_back(shared: Pod) -> None:
    expected = await undisturbed(shared, 40)
    before, metrics = await shared.stats(), shared.metrics()
    async with shared.driver() as driver:
        job = driver.job("a", PROMPT, **SAMPLED)
        await driver.generate(job, 15)
        out = await driver.op(OFFLOAD, job)
        known = len(PROMPT) + 15
        assert (out.status, out.tokens) == (OK, known - 1)
        assert out.bytes == 5 * BLOCK_BYTES and out.seconds > 0
        assert driver.free_device_blocks == DEVICE_BLOCKS
        assert driver.reports[-1].free_host_blocks == HOST_BLOCKS - 5
        # Another job writes every block of the device meanwhile.
        other = driver.job("b", PROMPT[::-1] * 4)
        await driver.generate(other, 19, chunk=64)
        assert driver.free_device_blocks == 0
        await driver.op(RELEASE, other)
        back = await driver.op(UPLOAD, job)
        assert (back.status, back.tokens, back.bytes) == (OK, known - 1, 5 * BLOCK_BYTES)
        ran = len(driver.reports)
        assert await driver.generate(job, 30) == expected[:30]
        assert list(driver.reports[ran].row_new_tokens) == [1]  # nothing was computed again
        again = await driver.op(OFFLOAD, job)
        assert again.bytes == 2 * BLOCK_BYTES  # tokens 32 to 47: the part-filled block and one more
        assert (await driver.op(UPLOAD, job)).status == OK
        assert await driver.generate(job, 40) == expected
        stats = await shared.stats()
        assert (stats.committed_slots, stats.reserved_slots, stats.jobs) == (6, 0, 1)
        assert stats.committed_bytes_total - before.committed_bytes_total == 7 * BLOCK_BYTES
        assert stats.looked_up_bytes_total - before.looked_up_bytes_total == 11 * BLOCK_BYTES
        await driver.op(RELEASE, job)
        assert (await shared.stats()).committed_slots == 0
    now = shared.metrics()
    for direction, blocks in (("out", 7), ("in", 11)):
        name = f'fastserve_swap_bytes_total{{direction="{direction}"}}'
        assert now[name] - metrics.get(name, 0) == blocks * BLOCK_BYTES


async def test_full_blocks_go_out_while_the_job_runs_on(shared: Pod) -> None:
    """A copy in every plan, beside a row of the same job; what comes back gives the same text."""
    expected = await undisturbed(shared, 40)
    async with shared.driver() as driver:
        job = driver.job("a", PROMPT, **SAMPLED)
        copies = []
        while len(driver.output[job]) < 30:
            ran = driver.iterations
            copies += await driver.plan({job: 7}, [(COPY_OUT, job)], op_blocks=[1])
            await driver.until(lambda ran=ran: driver.iterations > ran)  # type: ignore[misc]
        await driver.until(lambda: set(copies) <= set(driver.done))
        assert not driver.failed
        assert {driver.done[number].status for number in copies} == {OK}
        full = (len(PROMPT) + 30 - 1) // BLOCK
        stored = max(driver.done[number].tokens for number in copies)
        assert (full - 1) * BLOCK <= stored <= full * BLOCK  # the last may have filled meanwhile
        assert sum(driver.done[number].bytes for number in copies) == stored // BLOCK * BLOCK_BYTES
        await driver.op(DROP_DEVICE, job)  # leaving costs no copy
        other = driver.job("b", PROMPT[::-1] * 4)  # writes every block of the device
        await driver.generate(other, 19, chunk=64)
        assert driver.free_device_blocks == 0
        await driver.op(RELEASE, other)
        back = await driver.op(UPLOAD, job)
        assert (back.status, back.tokens) == (OK, stored)
        assert await driver.generate(job, 40) == expected
        await driver.op(RELEASE, job)
        assert (await shared.stats()).committed_slots == 0


async def test_beginnings_come_from_the_host(shared: Pod) -> None:
    await beginnings_come_from_the_host(shared)


async def test_a_full_host_refuses_and_the_job_goes_on(shared: Pod) -> None:  # LMCache #1330
    expected = await undisturbed(shared, 12)
    async with shared.driver() as driver:
        big = [driver.job(f"big-{i}", [i + 2] * 60) for i in range(2)]
        for name in big:
            await driver.generate(name, 1, chunk=64)
            assert (await driver.op(OFFLOAD, name)).status == OK
        job = driver.job("a", PROMPT, **SAMPLED)
        await driver.generate(job, 6)
        refused = await driver.op(OFFLOAD, job)
        assert (refused.status, refused.bytes) == (NO_HOST_SPACE, 0)
        ran = len(driver.reports)
        assert await driver.generate(job, 12) == expected
        assert list(driver.reports[ran].row_new_tokens) == [1]
        for name in (*big, job):
            await driver.op(RELEASE, name)
        assert driver.free_device_blocks == DEVICE_BLOCKS
        assert (await shared.stats()).free_slots == HOST_BLOCKS


async def test_jobs_in_one_batch_give_what_they_give_alone(shared: Pod) -> None:
    expected = await undisturbed(shared, 10)
    async with shared.driver() as driver:
        job = driver.job("a", PROMPT, **SAMPLED)
        ends = driver.job("b", [9, 8, 7], max_tokens=4)
        bad = driver.job("c", [VOCAB])
        await driver.plan({job: 5, ends: 5, bad: 5}, lease=13)
        await driver.until(lambda: driver.iterations == 13)
        assert driver.output[job] == expected
        assert driver.finished == {ends: sampling_pb2.FINISH_REASON_LENGTH}
        assert len(driver.output[ends]) == 4
        assert driver.failed == {bad: f"token {VOCAB} is not in the vocabulary of {VOCAB}"}
        for name in (job, ends, bad):
            await driver.op(RELEASE, name)


async def test_describe(shared: Pod) -> None:
    async with channel(shared.address) as connection:
        stub = worker_pb2_grpc.WorkerServiceStub(connection)
        found = await stub.Describe(worker_pb2.DescribeRequest())
    expected = {
        "worker_id": "w-7",
        "model": shared.model.name,
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "block_size": BLOCK,
        "block_bytes": BLOCK_BYTES,
        "device_blocks": DEVICE_BLOCKS,
        "host_blocks": HOST_BLOCKS,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "vocab_size": VOCAB,
        "eos_token_ids": [EOS],
    }
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.epoch > 0
    assert (found.prefill_cost.rows, found.prefill_cost.new_tokens) == (1, 64)
    assert (found.decode_cost.rows, found.decode_cost.new_tokens) == (1, 1)
    assert 0 < found.decode_cost.seconds < 1 and 0 < found.prefill_cost.seconds < 1


async def test_metrics(shared: Pod) -> None:
    before = shared.metrics()
    await undisturbed(shared, 8)
    now = shared.metrics()
    label = f'{{model_name="{shared.model.name}"}}'

    def grown(name: str) -> float:
        return now[name] - before.get(name, 0)

    assert grown(f"vllm:prompt_tokens_total{label}") == len(PROMPT)
    assert grown(f"vllm:generation_tokens_total{label}") == 8
    assert grown('fastserve_iteration_seconds_count{phase="prefill"}') == 1
    assert grown('fastserve_iteration_seconds_count{phase="decode"}') == 7
    assert now[f"vllm:kv_cache_usage_perc{label}"] == 0
    info = f'block_size="{BLOCK}",model_name="{shared.model.name}",num_gpu_blocks="{DEVICE_BLOCKS}"'
    assert now[f"vllm:cache_config_info{{{info}}}"] == 1


# --- streams -------------------------------------------------------------------------------------


async def test_the_next_stream_finds_the_kv_of_the_last(shared: Pod) -> None:
    expected = await undisturbed(shared, 20)
    output: dict[str, list[int]] = {}
    async with shared.driver(output) as driver:
        on_device = driver.job("device", PROMPT, **SAMPLED)
        on_host = driver.job("host", PROMPT, **SAMPLED)
        for name in (on_device, on_host):
            await driver.generate(name, 7)
        await driver.op(OFFLOAD, on_host)
    async with shared.driver(output) as driver:
        computed = len(PROMPT) + 6
        assert driver.held == {"device": (computed, 0), "host": (0, computed)}
        for name in (on_device, on_host):
            driver.job(name, PROMPT, **SAMPLED)
        assert (await driver.op(UPLOAD, on_host)).tokens == computed
        ran = len(driver.reports)
        for name in (on_device, on_host):
            assert await driver.generate(name, 20) == expected
        assert all(list(report.row_new_tokens) == [1] for report in driver.reports[ran:])
        for name in (on_device, on_host):
            await driver.op(RELEASE, name)
    async with shared.driver() as driver:
        assert driver.held == {}


async def refused(epoch: int, pod: Pod, code: grpc.StatusCode, why: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=why) as caught:
        async with worker_driver(pod.address, epoch):
            pass
    assert caught.value.code() is code


async def test_a_lower_epoch_is_refused_and_a_higher_one_takes_over(pod: Pod) -> None:
    async with worker_driver(pod.address, epoch=5) as old:
        job = old.job("a", PROMPT)
        await refused(4, pod, grpc.StatusCode.FAILED_PRECONDITION, "epoch 5 is served already")
        await old.generate(job, 3)  # not disturbed by the one that was refused
        async with worker_driver(pod.address, epoch=6, output=old.output) as new:
            await old.ended()
            assert new.held == {"a": (len(PROMPT) + 2, 0)}
            new.job("a", PROMPT)
            await new.generate("a", 5)
    await refused(5, pod, grpc.StatusCode.FAILED_PRECONDITION, "epoch 6 is served already")


async def test_a_scheduler_of_another_shard_is_refused_whatever_its_epoch(pod: Pod) -> None:
    async with worker_driver(pod.address, epoch=5, shard="a") as driver:
        job = driver.job("a", PROMPT)
        with pytest.raises(grpc.aio.AioRpcError, match="belongs to shard 'a', not 'b'") as caught:
            async with worker_driver(pod.address, epoch=6, shard="b"):
                pass
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        await driver.generate(job, 3)
    async with worker_driver(pod.address, epoch=5, shard="a") as driver:
        assert driver.held


async def test_of_several_schedulers_that_wait_the_last_is_served(pod: Pod) -> None:
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(worker_driver(pod.address, epoch=1))
        waiting = [stack.enter_async_context(worker_driver(pod.address, e)) for e in (2, 3, 4)]
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        last = outcomes[-1]
        assert isinstance(last, WorkerDriver)
        await last.generate(last.job("a", PROMPT), 3)
        await first.ended()


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ({"row_handles": [1]}, "row_handles and row_tokens differ in length"),
        ({"op_ids": [1]}, "op_ids, ops and op_handles differ in length"),
        ({"row_handles": [1, 1], "row_tokens": [1, 1]}, "a job has two rows"),
        ({"plan_id": 1}, "plan 1 after plan 1"),
        ({"scheduler_epoch": 0}, "epoch 0 on a stream of epoch"),
        ({"op_ids": [1], "ops": [0], "op_handles": [1]}, "unknown KV operation 0"),
        ({"new_jobs": [worker_pb2.Job(job_id="a", prompt_len=1)]}, "prompt_len exceeds its tokens"),
        (
            {
                "new_jobs": [
                    worker_pb2.Job(
                        job_id="a", sampling=sampling_pb2.SamplingParams(logit_bias_ids=[1])
                    )
                ]
            },
            "logit_bias_ids and logit_bias_values differ in length",
        ),
    ],
)
async def test_a_broken_plan_ends_its_stream_and_nothing_else(
    shared: Pod, plan: dict[str, Any], why: str
) -> None:
    async with shared.driver() as driver:
        await driver.send(**plan)
        with pytest.raises(grpc.aio.AioRpcError, match=why) as caught:
            await driver.ended()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await undisturbed(shared, 2)


async def test_the_first_plan_must_be_a_reset(shared: Pod) -> None:
    async with channel(shared.address) as connection:
        call = worker_pb2_grpc.WorkerServiceStub(connection).Run()
        await call.write(worker_pb2.RunRequest(plan=worker_pb2.Plan(plan_id=1, lease=1)))
        with pytest.raises(grpc.aio.AioRpcError, match="must be a reset") as caught:
            await asyncio.wait_for(call.read(), 20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# --- death ---------------------------------------------------------------------------------------


async def test_a_worker_that_is_killed_finds_its_jobs_on_the_host(pod: Pod) -> None:
    expected = await undisturbed(pod, 25)
    output: dict[str, list[int]] = {}
    async with pod.driver(output) as driver:
        saved = driver.job("saved", PROMPT, **SAMPLED)
        running = driver.job("running", PROMPT, **SAMPLED)
        await driver.generate(saved, 9)
        await driver.op(OFFLOAD, saved)
        await driver.generate(running, 4)
        pod.worker.kill()
        with pytest.raises(grpc.aio.AioRpcError):
            await driver.ended()
    pod.start_worker()
    async with pod.driver(output) as driver:
        computed = len(PROMPT) + 8
        assert driver.held == {"saved": (0, computed)}
        assert driver.reports[0].free_host_blocks == HOST_BLOCKS - 4
        for name in (saved, running):
            driver.job(name, PROMPT, **SAMPLED)
        back = await driver.op(UPLOAD, saved)
        assert (back.status, back.tokens, back.bytes) == (OK, computed, 4 * BLOCK_BYTES)
        ran = len(driver.reports)
        assert await driver.generate(saved, 25) == expected
        assert list(driver.reports[ran].row_new_tokens) == [1]
        assert await driver.generate(running, 25) == expected  # recomputed from its tokens
        for name in (saved, running):
            await driver.op(RELEASE, name)
    assert (await pod.stats()).free_slots == HOST_BLOCKS


async def test_a_sidecar_that_is_killed_costs_a_recompute(pod: Pod) -> None:
    expected = await undisturbed(pod, 30)
    async with pod.driver() as driver:
        jobs = [driver.job(name, PROMPT, **SAMPLED) for name in ("a", "b")]
        for name in jobs:
            await driver.generate(name, 6)
        await driver.op(OFFLOAD, "a")
        pod.sidecar.kill()
        lost = await driver.op(UPLOAD, "a")
        assert (lost.status, lost.tokens, lost.bytes) == (LOST, 0, 0)
        assert await driver.generate("a", 12) == expected[:12]
        kept = await driver.op(OFFLOAD, "b")  # nowhere to go: it stays where it is
        assert kept.status == NO_HOST_SPACE
        assert await driver.generate("b", 12) == expected[:12]
        assert driver.reports[-1].free_host_blocks == 0
        pod.start_sidecar()
        for name in jobs:
            out = await driver.op(OFFLOAD, name)
            assert (out.status, out.bytes) == (OK, 4 * BLOCK_BYTES)  # all of it, to the new one
            assert (await driver.op(UPLOAD, name)).status == OK
            assert await driver.generate(name, 30) == expected
        stats = await pod.stats()
        assert stats.committed_bytes_total == stats.looked_up_bytes_total == 8 * BLOCK_BYTES
        for name in jobs:
            await driver.op(RELEASE, name)
        assert driver.free_device_blocks == DEVICE_BLOCKS


# --- the disk ------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def small_pod(model: Path, tmp_path: Path) -> Iterator[Pod]:
    """The host holds one job and a half, the disk the others."""
    with contextlib.ExitStack() as stack:
        yield Pod(tmp_path, model, stack, DEVICE_BLOCKS, host_blocks=8, disk_blocks=16)


async def offload_all(driver: WorkerDriver) -> None:
    for name in NAMES:
        driver.job(name, PROMPT, **SAMPLED)
        await driver.generate(name, 9)
        assert (await driver.op(OFFLOAD, name)).status == OK


async def test_jobs_come_back_from_the_disk(small_pod: Pod) -> None:
    pod, held = small_pod, 8 + 16 - 1
    expected = await undisturbed(pod, 25)
    async with pod.driver() as driver:
        await offload_all(driver)
        assert driver.reports[-1].free_host_blocks == held - 16

        async def spilled() -> bool:  # the last of them is written while nobody waits for it
            return (await pod.stats()).disk_blocks >= 9

        await eventually_async(spilled, "a free host slot")
        for name in NAMES:
            back = await driver.op(UPLOAD, name)
            assert (back.status, back.bytes) == (OK, 4 * BLOCK_BYTES)
            ran = len(driver.reports)
            assert await driver.generate(name, 25) == expected
            assert list(driver.reports[ran].row_new_tokens) == [1]  # nothing was computed again
            await driver.op(RELEASE, name)
        stats = await pod.stats()
        assert stats.fetched_blocks_total >= 9
        assert (stats.jobs, stats.disk_blocks, stats.committed_slots) == (0, 0, 0)
        assert driver.reports[-1].free_host_blocks == held


async def test_a_worker_that_is_killed_finds_its_jobs_on_the_disk(small_pod: Pod) -> None:
    pod = small_pod
    expected = await undisturbed(pod, 20)
    output: dict[str, list[int]] = {}
    async with pod.driver(output) as driver:
        await offload_all(driver)
        pod.worker.kill()
    pod.start_worker()
    async with pod.driver(output) as driver:
        computed = len(PROMPT) + 8
        assert driver.held == dict.fromkeys(NAMES, (0, computed))
        for name in NAMES:
            driver.job(name, PROMPT, **SAMPLED)
            back = await driver.op(UPLOAD, name)
            assert (back.status, back.tokens) == (OK, computed)
            assert await driver.generate(name, 20) == expected
            await driver.op(RELEASE, name)


async def test_a_damaged_disk_costs_a_recompute(small_pod: Pod) -> None:
    pod = small_pod
    expected = await undisturbed(pod, 20)
    async with pod.driver() as driver:
        await offload_all(driver)
        (path,) = pod.folder.glob("fastserve-kvdisk-*")
        path.write_bytes(b"\xff" * path.stat().st_size)
        outcomes = []
        for name in NAMES:
            back = await driver.op(UPLOAD, name)
            outcomes.append(back.status)
            assert await driver.generate(name, 20) == expected
            await driver.op(RELEASE, name)
        assert outcomes[0] == LOST and set(outcomes) <= {LOST, OK}
        assert pod.sidecar.metrics()['fastserve_kv_verify_failures_total{tier="disk"}'] >= 1
        assert (await pod.stats()).jobs == 0
