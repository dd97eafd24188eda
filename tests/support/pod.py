"""A worker with a tiny model and its sidecar, as processes, each of which can die and come back."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastserve.common.rpc import channel
from fastserve.proto.v1 import kv_offload_pb2, kv_offload_pb2_grpc
from support.processes import Running, service
from support.waiting import eventually_async
from support.worker_driver import RELEASE, WorkerDriver, worker_driver


@dataclass
class Pod:
    """Both keep their addresses. `model`: a folder of `tiny_model`."""

    folder: Path
    model: Path
    stack: contextlib.ExitStack
    device_blocks: int
    host_blocks: int
    disk_blocks: int = 0
    worker_flags: tuple[str, ...] = ()
    ranks: int = 1  # each has a pool of `host_blocks`
    worker_id: str = "w-7"
    sidecar_flags: tuple[str, ...] = ()

    block: ClassVar[int] = 8  # tokens
    block_bytes: ClassVar[int] = 3 * 2 * 2 * 16 * 4 * block  # layers, K, V, heads, head_dim, fp32

    def __post_init__(self) -> None:
        self._epochs = itertools.count(10)
        self.sidecar = self.start_sidecar()
        self.worker = self.start_worker()

    def start_sidecar(self) -> Running:
        flags = ["--listen", f"unix:{self.folder}/kv", "--host-blocks", str(self.host_blocks)]
        flags += ["--pool-dir", str(self.folder), "--workers", str(self.ranks)]
        if self.disk_blocks:
            slot = -(-self.block_bytes // 4096) * 4096
            flags += ["--disk-path", str(self.folder), "--disk-size", str(self.disk_blocks * slot)]
        flags += self.sidecar_flags
        self.sidecar = self.stack.enter_context(
            service("fastserve.kv_offload", self.folder, *flags)
        )
        return self.sidecar

    def start_worker(self) -> Running:
        flags = ["--listen", f"unix:{self.folder}/w", "--model", str(self.model)]
        flags += ["--kv-offload", f"unix:{self.folder}/kv", "--worker-id", self.worker_id]
        flags += ["--block-size", str(self.block), "--kv-blocks", str(self.device_blocks)]
        flags += ["--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--threads", "1"]
        flags += ["--dtype", "float32", "--device", "cpu", "--max-model-len", "128"]
        # Without a scheduler, jobs that are left would be waited for.
        flags += ["--shutdown-timeout", "1"]
        flags += self.worker_flags
        self.worker = self.stack.enter_context(service("fastserve.worker", self.folder, *flags))
        return self.worker

    @property
    def address(self) -> str:
        return str(self.worker.info["address"])

    def driver(
        self, output: dict[str, list[int]] | None = None
    ) -> contextlib.AbstractAsyncContextManager[WorkerDriver]:
        """A scheduler that is younger than all before it."""
        return worker_driver(self.address, next(self._epochs), output)

    async def stats(self) -> kv_offload_pb2.StatsResponse:
        async with channel(self.sidecar.info["address"]) as connection:
            stub = kv_offload_pb2_grpc.KvOffloadServiceStub(connection)
            return await stub.Stats(kv_offload_pb2.StatsRequest())

    def metrics(self) -> dict[str, float]:
        return self.worker.metrics()


async def beginnings_come_from_the_host(pod: Pod) -> None:
    """A job, another one that takes all blocks of the device, and the job again: it begins with
    what the host kept, says so, and gives the same tokens. For 12 blocks on the device, 16 there.
    """
    prompt = [(7 * n) % 250 for n in range(5 * Pod.block + 3)]
    other = [n % 240 for n in range(11 * Pod.block)]
    async with pod.driver() as driver:
        for name, tokens, cached in (("first", prompt, 5), ("other", other, 16)):
            job = driver.job(name, tokens, salt=b"a", temperature=0.0)
            await driver.generate(job, 4, chunk=64)
            await driver.op(RELEASE, job)

            async def kept(blocks: int = cached * pod.ranks) -> bool:
                return (await pod.stats()).cached_blocks == blocks

            await eventually_async(kept, f"{cached} blocks on the host")
        before = len(driver.reports)
        job = driver.job("again", prompt, salt=b"a", temperature=0.0)
        await driver.generate(job, 4, chunk=64)
        told = [list(report.cached_tokens) for report in driver.reports[before:]]
        assert [tokens for tokens in told if tokens] == [[5 * Pod.block]]
        assert driver.output["again"] == driver.output["first"]
        await driver.op(RELEASE, job)
        assert driver.free_device_blocks == pod.device_blocks
    assert pod.metrics()['fastserve_prefix_cache_hits_total{tier="host"}'] == 5 * Pod.block
