"""The gRPC service for workers (contract: proto/fastserve/v1/kv_offload.proto)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Protocol

from fastserve.kv_offload.errors import PoolFull, SlotError
from fastserve.kv_offload.metrics import Metrics
from fastserve.kv_offload.owners import Layout, Owner, Owners
from fastserve.kv_offload.peer_client import PeerClient
from fastserve.kv_offload.settings import Settings
from fastserve.kv_offload.slots import Block
from fastserve.kv_offload.status import Context, refusing, stream_refusing
from fastserve.proto.v1 import kv_offload_pb2 as pb
from fastserve.proto.v1 import kv_offload_pb2_grpc as pb_grpc

_READ_AHEAD = 2  # pieces handed out and not acknowledged: one is copied, one comes from the disk


class _Call(Protocol):
    """The fields that say who calls."""

    worker_id: str
    worker_epoch: int
    sidecar_epoch: int


class KvOffload(pb_grpc.KvOffloadServiceServicer):
    """Calls of workers; all methods run on the event loop, so no locks."""

    def __init__(
        self,
        settings: Settings,
        owners: Owners,
        peers: PeerClient,
        metrics: Metrics,
        peer_address: str,
    ) -> None:
        """peer_address: where other sidecars reach this one; "" if they cannot."""
        self._peer_address = peer_address
        self._settings, self._owners, self._peers = settings, owners, peers
        self._metrics = metrics
        self._epoch = time.time_ns()
        self._committed_bytes = self._read_bytes = self._released = self._rejected = 0

    @refusing
    async def Attach(self, request: pb.AttachRequest, context: Context) -> pb.AttachResponse:
        if not request.worker_id or not request.block_bytes or not request.block_size:
            raise SlotError("worker_id, block_bytes and block_size must be set")
        layout = Layout(request.layout, request.block_bytes, request.block_size)
        owner = await self._owners.attach(request.worker_id, request.worker_epoch, layout)
        tiers = owner.tiers
        return pb.AttachResponse(
            sidecar_epoch=owner.epoch,
            pool_path=str(tiers.pool.path),
            pool_bytes=tiers.pool.size,
            slot_bytes=tiers.slot_bytes,
            slots=tiers.table.slots,
            capacity_blocks=tiers.table.capacity,
            free_blocks=tiers.table.room,
            verify=self._settings.verify,
            owner_lease_seconds=self._settings.owner_lease,
            peer_address=self._peer_address,
        )

    @refusing
    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        owner = self._owner(request)
        self._owners.renew(owner)
        return pb.RenewResponse(free_blocks=owner.tiers.table.room)

    @refusing
    async def Detach(self, request: pb.DetachRequest, context: Context) -> pb.DetachResponse:
        self._owners.detach(self._owner(request))
        return pb.DetachResponse()

    @refusing
    async def Reserve(self, request: pb.ReserveRequest, context: Context) -> pb.ReserveResponse:
        owner = self._owner(request)
        if request.cache_blocks:
            slots = owner.tiers.fill_cache(request.cache_blocks)
            return pb.ReserveResponse(slots=slots, free_slots=owner.tiers.table.room)
        if not request.job_id or not request.block_indexes:
            raise SlotError("job_id and block_indexes must be set")
        try:
            slots = await owner.tiers.reserve(request.job_id, request.block_indexes)
        except PoolFull:
            self._rejected += 1
            self._metrics.rejected()
            raise
        return pb.ReserveResponse(slots=slots, free_slots=owner.tiers.table.room)

    @refusing
    async def Commit(self, request: pb.CommitRequest, context: Context) -> pb.CommitResponse:
        owner = self._owner(request)
        tiers, slots, checksums = owner.tiers, request.slots, request.checksums
        if request.keys:
            tiers.keep_cached(slots, request.keys, checksums)
        else:
            tiers.commit(request.job_id, slots, request.valid_tokens, checksums)
        self._committed_bytes += len(slots) * owner.layout.block_bytes
        return pb.CommitResponse(
            free_slots=tiers.table.room, cached_blocks=tiers.table.cache.cached
        )

    @refusing
    async def Lookup(self, request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        table = self._owner(request).tiers.table
        reply = pb.LookupResponse()
        for job_id in request.job_ids or table.jobs:
            blocks = table.lookup(job_id)
            if not blocks:
                continue
            reply.job_ids.append(job_id)
            reply.block_counts.append(len(blocks))
            reply.block_indexes.extend(index for index, _ in blocks)
            reply.slots.extend(block.slot or 0 for _, block in blocks)
            reply.valid_tokens.extend(block.valid_tokens for _, block in blocks)
            reply.checksums.extend(block.checksum for _, block in blocks)
            reply.on_disk.extend(int(not block.readable) for _, block in blocks)
        return reply

    @stream_refusing
    async def Read(
        self, request_iterator: AsyncIterator[pb.ReadRequest], context: Context
    ) -> AsyncIterator[pb.ReadResponse]:
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None:
            return
        owner = self._owner(first)
        if first.keys:
            async with aclosing(self._read_cached(owner, first.keys, requests)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        tiers, job_id, indexes = owner.tiers, first.job_id, first.block_indexes
        outstanding: deque[tuple[list[Block], float]] = deque()

        async def acknowledged() -> bool:
            """Wait for the worker to have read the oldest piece; False if it has gone."""
            message = await anext(requests, None)
            if message is None:
                return False
            blocks, since = outstanding.popleft()
            tiers.close_blocks(blocks)
            self._owners.touch(owner)
            if message.damaged:
                self._metrics.verify_failed("host")
                tiers.forget(job_id)
                return False
            self._copied_in(owner, len(blocks), since)
            return True

        try:
            tiers.find(job_id, indexes)
            for start in range(0, len(indexes), tiers.piece):
                if len(outstanding) == _READ_AHEAD and not await acknowledged():
                    return
                blocks = await tiers.open(job_id, indexes[start : start + tiers.piece])
                outstanding.append((blocks, time.perf_counter()))
                yield _piece(blocks)
            while outstanding:
                if not await acknowledged():
                    return
        finally:
            for blocks, _ in outstanding:
                tiers.close_blocks(blocks)

    async def _read_cached(
        self, owner: Owner, keys: Sequence[bytes], requests: AsyncIterator[pb.ReadRequest]
    ) -> AsyncGenerator[pb.ReadResponse]:
        """The one piece, if the first key is there; over once it is acknowledged."""
        since, damaged = time.perf_counter(), False
        blocks = owner.tiers.open_cached(keys)
        try:
            if not blocks:
                return
            yield pb.ReadResponse(
                block_indexes=range(len(blocks)),
                slots=[block.slot for block in blocks],
                valid_tokens=[owner.layout.block_size] * len(blocks),
                checksums=[block.checksum for block in blocks],
            )
            message = await anext(requests, None)
            if message is None:
                return
            damaged = message.damaged
            if damaged:
                self._metrics.verify_failed("host")
            else:
                self._copied_in(owner, len(blocks), since)
        finally:
            owner.tiers.close_cached(blocks, damaged=damaged)

    def _copied_in(self, owner: Owner, blocks: int, since: float) -> None:
        moved = blocks * owner.layout.block_bytes
        self._read_bytes += moved
        self._metrics.moved("host", "in", moved, time.perf_counter() - since)

    @refusing
    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        tiers = self._owner(request).tiers
        freed = sum(tiers.forget(job_id) for job_id in request.job_ids)
        self._released += freed
        return pb.ReleaseResponse(freed_slots=freed, free_slots=tiers.table.room)

    @refusing
    async def Export(self, request: pb.ExportRequest, context: Context) -> pb.ExportResponse:
        owner = self._owner(request)
        if not request.peer or not request.to_worker_id:
            raise SlotError("peer and to_worker_id must be set")
        blocks = 0
        for job_id in request.job_ids:
            blocks += await self._peers.push(owner, job_id, request.peer, request.to_worker_id)
        return pb.ExportResponse(blocks=blocks, bytes=blocks * owner.layout.block_bytes)

    async def Stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsResponse:
        tiers = [owner.tiers for owner in self._owners]
        tables = [one.table for one in tiers]
        return pb.StatsResponse(
            sidecar_epoch=self._epoch,
            slots=sum(table.slots for table in tables),
            free_slots=sum(table.free for table in tables),
            reserved_slots=sum(table.reserved for table in tables),
            committed_slots=sum(table.committed - table.on_disk for table in tables),
            cached_blocks=sum(table.cache.cached for table in tables),
            jobs=sum(len(table.jobs) for table in tables),
            committed_bytes_total=self._committed_bytes,
            looked_up_bytes_total=self._read_bytes,
            released_slots_total=self._released,
            rejected_reservations_total=self._rejected,
            disk_slots=sum(table.disk_slots for table in tables),
            free_disk_slots=sum(table.free_disk for table in tables),
            disk_blocks=sum(table.on_disk for table in tables),
            owners=len(tiers),
            spilled_blocks_total=sum(one.spilled for one in tiers),
            fetched_blocks_total=sum(one.fetched for one in tiers),
        )

    def _owner(self, request: _Call) -> Owner:
        """Who calls. Raises `StaleCall` for a past life, of the worker or of the sidecar."""
        return self._owners.caller(request.worker_id, request.worker_epoch, request.sidecar_epoch)


def _piece(blocks: list[Block]) -> pb.ReadResponse:
    reply = pb.ReadResponse()
    for block in blocks:
        assert block.slot is not None
        reply.block_indexes.append(block.index)
        reply.slots.append(block.slot)
        reply.valid_tokens.append(block.valid_tokens)
        reply.checksums.append(block.checksum)
    return reply
