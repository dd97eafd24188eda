"""The gRPC service around the slot table (contract: proto/fastserve/v1/kv_offload.proto)."""

from __future__ import annotations

import time
from typing import Any, NoReturn, TypeAlias

import grpc
import structlog

from fastserve.common.errors import StartupError
from fastserve.kv_offload.metrics import Metrics
from fastserve.kv_offload.pool import Pool, slot_bytes
from fastserve.kv_offload.settings import Settings, parse_size
from fastserve.kv_offload.slots import PoolFull, SlotError, SlotTable
from fastserve.proto.v1 import kv_offload_pb2 as pb
from fastserve.proto.v1 import kv_offload_pb2_grpc as pb_grpc

log = structlog.get_logger(__name__)
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Call = pb.ReserveRequest | pb.CommitRequest | pb.LookupRequest | pb.ReleaseRequest


class KvOffload(pb_grpc.KvOffloadServiceServicer):
    """One pool for one worker; all methods run on the event loop, so no locks."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._epoch = time.time_ns()
        self._pool: Pool | None = None
        self._table = SlotTable(0, 1)
        self._layout: tuple[str, str, int, int] | None = None  # worker, layout, bytes, tokens
        self._worker_epoch = 0
        self._committed_bytes = 0
        self._looked_up_bytes = 0
        self._released = 0
        self._rejected = 0

    async def Attach(self, request: pb.AttachRequest, context: Context) -> pb.AttachResponse:
        if not request.worker_id or not request.block_bytes or not request.block_size:
            await _refuse(context, "worker_id, block_bytes and block_size must be set")
        if self._layout is not None and request.worker_epoch < self._worker_epoch:
            await _stale(context, "a later life of this worker is attached")
        layout = (request.worker_id, request.layout, request.block_bytes, request.block_size)
        if layout != self._layout:
            await self._make_pool(layout, context)
        elif request.worker_epoch > self._worker_epoch:
            freed = self._table.drop_reservations()
            log.info("worker attached again", worker=request.worker_id, freed_slots=freed)
        self._worker_epoch = request.worker_epoch
        self._publish()
        assert self._pool is not None
        return pb.AttachResponse(
            sidecar_epoch=self._epoch,
            pool_path=str(self._pool.path),
            pool_bytes=self._pool.size,
            slot_bytes=slot_bytes(request.block_bytes),
            slots=self._table.slots,
        )

    async def _make_pool(self, layout: tuple[str, str, int, int], context: Context) -> None:
        worker_id, _, block_bytes, block_size = layout
        size = slot_bytes(block_bytes)
        slots = self._settings.host_blocks or parse_size(self._settings.host_memory) // size
        if slots == 0:
            await _refuse(
                context,
                f"a block of {size} bytes does not fit into --host-memory "
                f"{self._settings.host_memory}",
            )
        if self._pool is not None:
            log.warning("another layout: the pool is emptied", jobs=len(self._table.jobs))
            self._pool.close()
            self._pool = None
        self._layout, self._table = None, SlotTable(0, 1)
        try:
            self._pool = Pool(self._settings.pool_dir, slots * size)
        except StartupError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        self._layout, self._table = layout, SlotTable(slots, block_size)
        # Slots of the old pool must not be taken for slots of this one.
        self._epoch = time.time_ns()
        log.info("pool created", worker=worker_id, slots=slots, bytes=slots * size)

    async def Reserve(self, request: pb.ReserveRequest, context: Context) -> pb.ReserveResponse:
        await self._check(request, context)
        if not request.job_id or not request.block_indexes:
            await _refuse(context, "job_id and block_indexes must be set")
        try:
            slots = self._table.reserve(request.job_id, request.block_indexes)
        except PoolFull as error:
            self._rejected += 1
            self._metrics.rejected.inc()
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except SlotError as error:
            await _refuse(context, str(error))
        self._publish()
        return pb.ReserveResponse(slots=slots, free_slots=self._table.free)

    async def Commit(self, request: pb.CommitRequest, context: Context) -> pb.CommitResponse:
        await self._check(request, context)
        try:
            self._table.commit(
                request.job_id, request.slots, request.valid_tokens, request.checksums
            )
        except SlotError as error:
            await _refuse(context, str(error))
        moved = len(request.slots) * self._block_bytes
        self._committed_bytes += moved
        self._metrics.bytes.labels("out").inc(moved)
        self._publish()
        return pb.CommitResponse(free_slots=self._table.free)

    async def Lookup(self, request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        await self._check(request, context)
        reply = pb.LookupResponse()
        for job_id in request.job_ids or self._table.jobs:
            blocks = self._table.lookup(job_id)
            if not blocks:
                continue
            reply.job_ids.append(job_id)
            reply.block_counts.append(len(blocks))
            reply.block_indexes.extend(index for index, _ in blocks)
            reply.slots.extend(block.slot for _, block in blocks)
            reply.valid_tokens.extend(block.valid_tokens for _, block in blocks)
            reply.checksums.extend(block.checksum for _, block in blocks)
        if request.job_ids:  # asking for everything is taking stock, not reading
            moved = len(reply.slots) * self._block_bytes
            self._looked_up_bytes += moved
            self._metrics.bytes.labels("in").inc(moved)
        return reply

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        await self._check(request, context)
        freed = sum(self._table.release(job_id) for job_id in request.job_ids)
        self._released += freed
        self._publish()
        return pb.ReleaseResponse(freed_slots=freed, free_slots=self._table.free)

    async def Stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsResponse:
        return pb.StatsResponse(
            sidecar_epoch=self._epoch,
            slots=self._table.slots,
            free_slots=self._table.free,
            reserved_slots=self._table.reserved,
            committed_slots=self._table.committed,
            jobs=len(self._table.jobs),
            committed_bytes_total=self._committed_bytes,
            looked_up_bytes_total=self._looked_up_bytes,
            released_slots_total=self._released,
            rejected_reservations_total=self._rejected,
        )

    def close(self) -> None:
        """Remove the pool file."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    @property
    def _block_bytes(self) -> int:
        return self._layout[2] if self._layout is not None else 0

    async def _check(self, request: _Call, context: Context) -> None:
        """Refuse calls of a past life, of the worker or of the sidecar."""
        if self._layout is None or request.worker_id != self._layout[0]:
            await _stale(context, f"worker {request.worker_id!r} is not attached")
        if request.sidecar_epoch != self._epoch:
            await _stale(context, "the sidecar was restarted or its pool replaced")
        if request.worker_epoch != self._worker_epoch:
            await _stale(context, "another life of this worker is attached")

    def _publish(self) -> None:
        table = self._table
        self._metrics.update(
            table.slots, table.free, table.reserved, table.committed, len(table.jobs)
        )


async def _refuse(context: Context, why: str) -> NoReturn:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, why)


async def _stale(context: Context, why: str) -> NoReturn:
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{why}: attach again")
