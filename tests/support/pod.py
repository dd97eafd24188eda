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
from support.worker_driver import WorkerDriver, worker_driver


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
