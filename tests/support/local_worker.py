"""The real worker in the process of the test, so that its KV blocks can be looked at."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from fastserve.common.rpc import GrpcServer
from fastserve.proto.v1 import worker_pb2 as pb
from fastserve.proto.v1 import worker_pb2_grpc as pb_grpc
from fastserve.worker.block_pool import BlockPool
from fastserve.worker.calibrate import measure
from fastserve.worker.engine import Engine, Iteration
from fastserve.worker.engine_thread import EngineThread
from fastserve.worker.job import OpStatus
from fastserve.worker.kv_ops import CopyDone
from fastserve.worker.metrics import Metrics
from fastserve.worker.model.choose import AnyModel
from fastserve.worker.model.kv_cache import KvCache
from fastserve.worker.mover import StagingMover
from fastserve.worker.service import Worker
from fastserve.worker.staging import BlockRef, Copied, KvStaging

MAX_MODEL_LEN = 512
_EPOCHS = itertools.count(1)


class WatchedMover(StagingMover):
    """Remembers the bytes of every block that leaves the device and compares them with those that
    come back.

    All but the constructor runs on the engine thread.
    """

    def __init__(
        self,
        thread: EngineThread,
        loop: asyncio.AbstractEventLoop,
        staging: KvStaging | None,
        metrics: Metrics,
        kv: KvCache,
    ) -> None:
        super().__init__(thread, loop, staging, metrics)
        self._kv, self._block_size = kv.as_bytes(), kv.block_size
        self._left: dict[str, dict[int, bytes]] = {}  # job -> digests of its blocks on the host
        self._cached: dict[bytes, bytes] = {}  # key -> digest
        self.blocks: Counter[str] = Counter()  # "stored", "compared", "cached", "fetched"
        self.different: list[str] = []

    def _digest(self, block: int) -> bytes:
        return hashlib.blake2b(self._kv[block].numpy().data).digest()

    def store(self, job_id: str, blocks: Sequence[BlockRef], done: CopyDone) -> None:
        before = {ref.index: self._digest(ref.block) for ref in blocks}

        def watched(status: OpStatus, copied: Copied) -> None:
            if status is OpStatus.OK:
                self._left.setdefault(job_id, {}).update(before)
                self.blocks["stored"] += len(before)
            done(status, copied)

        super().store(job_id, blocks, watched)

    def load(self, job_id: str, blocks: Sequence[int], done: CopyDone) -> None:
        def watched(status: OpStatus, copied: Copied) -> None:
            if status is OpStatus.OK:
                for index, block in enumerate(blocks):
                    self.blocks["compared"] += 1
                    if self._digest(block) != self._left[job_id][index]:
                        self.different.append(f"block {index} of {job_id}")
            done(status, copied)

        super().load(job_id, blocks, watched)

    def save(
        self, blocks: Sequence[int], intact: Callable[[], Sequence[bytes]], done: CopyDone
    ) -> None:
        before = [self._digest(block) for block in blocks]

        def watched() -> Sequence[bytes]:
            keys = intact()
            for key, digest in zip(keys, before, strict=True):
                if key:
                    self._cached[key] = digest
                    self.blocks["cached"] += 1
            return keys

        super().save(blocks, watched, done)

    def fetch(self, keys: Sequence[bytes], blocks: Sequence[int], done: CopyDone) -> None:
        def watched(status: OpStatus, copied: Copied) -> None:
            if status is OpStatus.OK:
                for key, block in zip(
                    keys[: copied.tokens // self._block_size], blocks, strict=False
                ):
                    self.blocks["fetched"] += 1
                    if self._digest(block) != self._cached[key]:
                        self.different.append(f"cached block {block}")
            done(status, copied)

        super().fetch(keys, blocks, watched)


class LocalWorker:
    """Its address, its engine (on the engine thread; `blocks_free` may be read) and its mover."""

    def __init__(self, address: str, engine: Engine, mover: WatchedMover) -> None:
        self.address, self._engine, self.mover = address, engine, mover

    @property
    def free_blocks(self) -> int:
        return self._engine.pool.free


def _overwrite_what_is_taken(pool: BlockPool, kv: KvCache) -> None:
    """A block that gets a new owner holds nothing of the old one."""
    memory, take = kv.as_bytes(), pool.take

    def taken(count: int) -> list[int]:
        blocks = take(count)
        for block in blocks:
            memory[block] = 0x3C  # finite in every dtype
        return blocks

    pool.take = taken  # type: ignore[method-assign]


@contextlib.asynccontextmanager
async def local_worker(
    model: AnyModel,
    folder: Path,
    *,
    blocks: int,
    block_size: int,
    rows: int = 4,
    sidecar: str | None = None,
    seconds_of: Callable[[int], float] | None = None,
) -> AsyncIterator[LocalWorker]:
    """Serves on a socket in `folder`, as `fastserve.worker` does; without a sidecar, or with one
    at this address. seconds_of: what it says that an iteration of so many tokens took (default:
    what it measured)."""
    loop = asyncio.get_running_loop()
    kv = KvCache(model.config, blocks, block_size, model.dtype, model.device)
    prefill, decode = measure(model, kv, 64)
    if seconds_of is not None:
        for sample in (prefill, decode):
            sample.seconds = seconds_of(sample.new_tokens)
    metrics = Metrics("local", block_size, blocks)
    epoch = next(_EPOCHS)
    staging = None
    if sidecar is not None:
        staging = KvStaging(sidecar, "local", epoch, kv.as_bytes(), block_size, "layout")
        await staging.attach()
    thread = EngineThread(loop)
    mover = WatchedMover(thread, loop, staging, metrics, kv)
    engine = Engine(
        model,
        kv,
        mover,
        eos_token_ids=frozenset(model.config.eos_token_ids),
        max_model_len=MAX_MODEL_LEN,
        vocab_size=model.config.vocab_size,
    )
    _overwrite_what_is_taken(engine.pool, kv)
    description = pb.DescribeResponse(
        worker_id="local",
        epoch=epoch,
        model="local",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=rows,
        max_num_batched_tokens=64,
        block_size=block_size,
        block_bytes=kv.block_bytes,
        device_blocks=blocks,
        host_blocks=staging.host_blocks if staging is not None else 0,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        vocab_size=model.config.vocab_size,
        prefill_cost=prefill,
        decode_cost=decode,
    )
    worker = Worker(description, engine, thread, mover, metrics)
    server = GrpcServer()
    pb_grpc.add_WorkerServiceServicer_to_server(worker, server.server)

    def report(iteration: Iteration) -> None:
        if seconds_of is not None:
            iteration.seconds = seconds_of(sum(new for _, new, _ in iteration.rows))
        worker.report(iteration)

    thread.start(engine, report)
    try:
        address = await server.start(f"unix:{folder}/local-{epoch}")
        yield LocalWorker(address, engine, mover)
        assert not thread.failure.done(), thread.failure
    finally:
        await server.stop(1.0)
        await thread.stop()
        if staging is not None:
            await staging.close()
