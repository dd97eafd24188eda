"""The gRPC service for sidecars of other pods: they may bring jobs, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import structlog
import xxhash

from fastserve.kv_offload.errors import BlockLost, JobExists, SlotError, StaleCall
from fastserve.kv_offload.metrics import Metrics
from fastserve.kv_offload.owners import Layout, Owner, Owners
from fastserve.kv_offload.peer_auth import ACCEPTED
from fastserve.kv_offload.slots import Holder
from fastserve.kv_offload.status import Context, refusing
from fastserve.proto.v1 import kv_offload_pb2 as pb
from fastserve.proto.v1 import kv_offload_pb2_grpc as pb_grpc

log = structlog.get_logger(__name__)
_STALL_S = 30.0  # a peer that sends nothing for so long holds slots for nothing
Requests = AsyncIterator[pb.ImportRequest]


class KvPeers(pb_grpc.KvPeerServiceServicer):
    """Takes in one job per call. Reading a message at a time, at the speed of our own memory, is
    the back-pressure: the stream's flow control hands it on to the sender."""

    def __init__(self, owners: Owners, metrics: Metrics) -> None:
        self._owners, self._metrics = owners, metrics

    @refusing
    async def Import(self, request_iterator: Requests, context: Context) -> pb.ImportResponse:
        requests = aiter(request_iterator)
        started = time.perf_counter()
        header = (await _next(requests)).header
        owner = self._owner_for(header)
        tiers, job_id = owner.tiers, header.job_id
        slots = await tiers.reserve(job_id, header.block_indexes, Holder.PEER)
        try:
            await context.send_initial_metadata((ACCEPTED,))
            for index, slot, checksum in zip(
                header.block_indexes, slots, header.checksums, strict=True
            ):
                view = tiers.host_view(slot)[: owner.layout.block_bytes]
                await _receive(requests, index, view)
                if await asyncio.to_thread(xxhash.xxh3_64_intdigest, view) != checksum:
                    self._metrics.verify_failed("peer")
                    raise BlockLost(f"block {index}: the checksum differs")
            if await anext(requests, None) is not None:
                raise SlotError("more came than the header names")
            if not self._owners.holds(owner):
                raise StaleCall(f"worker {owner.worker_id!r} lost its pool meanwhile")
            if tiers.table.lookup(job_id):
                raise JobExists(f"job {job_id} came here meanwhile")
            tiers.table.commit(job_id, slots, header.valid_tokens, header.checksums, Holder.PEER)
        finally:
            tiers.table.cancel(job_id, slots)  # nothing is left to cancel after the commit
            tiers.changed()
        size = len(slots) * owner.layout.block_bytes
        self._metrics.moved("peer", "in", size, time.perf_counter() - started)
        log.info("job taken from a peer", job_id=job_id, worker=owner.worker_id, blocks=len(slots))
        return pb.ImportResponse(blocks=len(slots))

    def _owner_for(self, header: pb.ImportHeader) -> Owner:
        owner = self._owners.named(header.to_worker_id)
        counts = {len(header.block_indexes), len(header.valid_tokens), len(header.checksums)}
        if not header.job_id or len(counts) != 1 or not header.block_indexes:
            raise SlotError("the header is incomplete")
        if owner.layout != Layout(header.layout, header.block_bytes, header.block_size):
            raise StaleCall(f"the blocks of worker {owner.worker_id!r} have another layout")
        if owner.tiers.table.lookup(header.job_id):
            raise JobExists(f"job {header.job_id} is here already")
        return owner


async def _receive(requests: Requests, index: int, into: memoryview) -> None:
    """One block, piece by piece."""
    filled = 0
    while filled < len(into):
        piece = (await _next(requests)).piece
        end = filled + len(piece.data)
        if (piece.block_index, piece.offset) != (index, filled) or not filled < end <= len(into):
            raise SlotError(f"block {index}, byte {filled} was to come next")
        into[filled:end] = piece.data
        filled = end


async def _next(requests: Requests) -> pb.ImportRequest:
    try:
        return await asyncio.wait_for(anext(requests), _STALL_S)
    except StopAsyncIteration:
        raise SlotError("the stream ended early") from None
    except TimeoutError:
        raise SlotError(f"nothing came for {_STALL_S:.0f} s") from None
