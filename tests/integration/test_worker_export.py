"""The KV of a job goes from one worker to another through their sidecars: real processes, a tiny
model, no scheduler."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastserve.proto.v1 import worker_pb2
from support.pod import Pod
from support.tiny_models import tiny_model
from support.waiting import eventually_async
from support.worker_driver import LOST, NOT_SENT, OK, RELEASE, UPLOAD

PROMPT = [(7 * n) % 250 for n in range(43)]
SAMPLING: dict[str, Any] = {"temperature": 2.0, "top_k": 4, "seed": 5}


def pods(folder: Path, stack: contextlib.ExitStack, **fields: object) -> list[Pod]:
    """Two of them, which can send KV to each other."""
    model, token = folder / "tiny", folder / "token"
    tiny_model(model)
    token.write_text("secret\n")

    def pod(name: str) -> Pod:
        own = folder / name
        own.mkdir()
        peer = ("--peer-listen", "127.0.0.1:0", "--peer-token-file", str(token))
        values = {"worker_id": name, "sidecar_flags": peer, **fields}
        return Pod(own, model, stack, device_blocks=32, host_blocks=32, **values)  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(pod, ("a", "b")))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Pod]]:
    with contextlib.ExitStack() as stack:
        yield pods(tmp_path_factory.mktemp("export"), stack)


async def undisturbed(pod: Pod, count: int) -> list[int]:
    async with pod.driver() as driver:
        job = driver.job("whole", PROMPT, **SAMPLING)
        tokens = await driver.generate(job, count, chunk=64)
        await driver.op(RELEASE, job)
        return list(tokens)


async def goes_on_elsewhere(here: Pod, there: Pod) -> None:
    """A job decodes on while its KV is sent and uploaded, then goes on with a short prefill."""
    expected = await undisturbed(here, 40)
    async with here.driver() as source, there.driver(source.output) as target:
        assert list(target.place.peers), "nobody can send KV there"
        job = source.job("j", PROMPT, **SAMPLING)
        await source.generate(job, 10, chunk=64)
        done = await source.export(job, target.place, rows=5)
        held = (len(PROMPT) + 9) // Pod.block * Pod.block
        assert done.status == OK and held <= done.tokens <= held + Pod.block
        assert done.bytes >= held // Pod.block * Pod.block_bytes and done.seconds > 0
        target.job("j", PROMPT, imported=done.tokens, **SAMPLING)
        uploaded = await target.op(UPLOAD, job)
        assert uploaded.status == OK and uploaded.tokens == done.tokens
        await source.generate(job, 20)
        before = len(target.reports)
        target.job("j", PROMPT, **SAMPLING)  # again, with what was computed meanwhile
        await target.generate(job, 40, chunk=64)
        assert source.output["j"] == expected
        rows = [sum(report.row_new_tokens) for report in target.reports[before:]]
        assert rows[0] == len(PROMPT) + 20 - done.tokens, "the short prefill"
        assert rows[1:] == [1] * 19
        for driver in (source, target):
            await driver.op(RELEASE, job)
            assert driver.free_device_blocks == 32
    for pod in (here, there):
        assert (await pod.stats()).committed_slots == 0


async def test_a_job_goes_on_elsewhere(pair: list[Pod]) -> None:
    await goes_on_elsewhere(*pair)


async def test_what_is_released_without_being_used_is_gone(pair: list[Pod]) -> None:
    here, there = pair
    async with here.driver() as source, there.driver() as target:
        job = source.job("j", PROMPT, **SAMPLING)
        await source.generate(job, 5, chunk=64)
        assert (await source.export(job, target.place)).status == OK
        assert (await there.stats()).committed_slots > 0
        target.job("j", [])
        await target.op(RELEASE, job)
        assert (await there.stats()).committed_slots == 0
        await source.op(RELEASE, job)


async def test_what_did_not_arrive_is_said(pair: list[Pod]) -> None:
    here, there = pair
    async with here.driver() as source, there.driver() as target:
        job = source.job("j", PROMPT, **SAMPLING)
        nowhere = worker_pb2.KvPlace(worker_id="b", peers=["127.0.0.1:9"])
        assert (await source.export(job, target.place)).status == NOT_SENT, "it has no KV"
        await source.generate(job, 5, chunk=64)
        done = await source.export(job, nowhere)
        assert done.status == NOT_SENT and done.tokens == len(PROMPT) // Pod.block * Pod.block
        stranger = worker_pb2.KvPlace(worker_id="z", peers=target.place.peers)
        assert (await source.export(job, stranger)).status == NOT_SENT
        assert (await source.export(job, target.place)).status == OK
        assert (await source.export(job, target.place)).status == NOT_SENT, "it is there already"
        lost = target.job("never came", PROMPT, imported=16, **SAMPLING)
        assert (await target.op(UPLOAD, lost)).status == LOST
        await target.generate(lost, 5, chunk=64)
        await source.op(RELEASE, job)
        await target.op(RELEASE, target.job("j", []))
        await target.op(RELEASE, lost)


async def test_an_export_ends_with_the_stream_that_asked_for_it(tmp_path: Path) -> None:
    """The other sidecar hangs; the next scheduler does not wait for that."""
    with contextlib.ExitStack() as stack:
        here, there = pods(tmp_path, stack)
        async with here.driver() as source, there.driver() as target:
            place = target.place
            job = source.job("j", PROMPT, **SAMPLING)
            await source.generate(job, 5, chunk=64)
            there.sidecar.process.send_signal(signal.SIGSTOP)
            try:
                await source.plan(
                    ops=[(worker_pb2.KV_OP_EXPORT, job)], op_blocks=[9], export_to=[place]
                )

                async def stored() -> bool:
                    return (await here.stats()).committed_slots > 0

                await eventually_async(stored, "the copy to the host")
                await source.close()
                async with here.driver(source.output) as again:
                    assert again.held["j"][1] == len(PROMPT) // Pod.block * Pod.block
            finally:
                there.sidecar.process.send_signal(signal.SIGCONT)

        async def nothing() -> bool:
            stats = await there.stats()
            return stats.committed_slots + stats.reserved_slots == 0

        await eventually_async(nothing, "nothing at the other sidecar")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
async def test_a_sidecar_that_came_back_elsewhere_is_found(tmp_path: Path, ranks: int) -> None:
    """The worker, idle, tells where its sidecar is now, and takes KV there."""
    with contextlib.ExitStack() as stack:
        flags = ("--tensor-parallel-size", str(ranks))
        here, there = pods(tmp_path, stack, ranks=ranks, worker_flags=flags)
        async with here.driver() as source, there.driver() as target:
            before = list(target.place.peers)
            job = source.job("j", PROMPT, **SAMPLING)
            await source.generate(job, 5, chunk=64)
            there.sidecar.kill()
            assert (await source.export(job, target.place)).status == NOT_SENT
            there.start_sidecar()
            now = [there.sidecar.info["peer_address"]] * ranks
            await target.until(lambda: list(target.place.peers) == now)
            assert now != before
            assert (await source.export(job, target.place)).status == OK
        async with there.driver() as again:
            assert list(again.place.peers) == now


@pytest.mark.slow
async def test_each_rank_sends_its_slice(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        flags = ("--tensor-parallel-size", "2")
        await goes_on_elsewhere(*pods(tmp_path, stack, ranks=2, worker_flags=flags))
