"""Sending copies of a job's blocks to the sidecar of another pod."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import TypeAlias

import grpc
import structlog

from fastserve.common.rpc import channel
from fastserve.kv_offload.errors import (
    BlockLost,
    BlockMissing,
    JobExists,
    KvError,
    NotHere,
    PeerRefused,
    PoolFull,
)
from fastserve.kv_offload.metrics import Metrics
from fastserve.kv_offload.owners import Owner
from fastserve.kv_offload.peer_auth import ACCEPTED, PeerAuth
from fastserve.kv_offload.slots import Block
from fastserve.proto.v1 import kv_offload_pb2 as pb
from fastserve.proto.v1 import kv_offload_pb2_grpc as pb_grpc

log = structlog.get_logger(__name__)
PIECE_BYTES = 1 << 20
_CONNECT_S = 3.0
Held: TypeAlias = "Sequence[tuple[int, Block]]"
Import: TypeAlias = "grpc.aio.StreamUnaryCall[pb.ImportRequest, pb.ImportResponse]"
_REFUSALS: dict[grpc.StatusCode, type[KvError]] = {
    grpc.StatusCode.NOT_FOUND: NotHere,
    grpc.StatusCode.ALREADY_EXISTS: JobExists,
    grpc.StatusCode.RESOURCE_EXHAUSTED: PoolFull,
}


class PeerClient:
    """Pushes jobs. One connection per push: moving a job is rare, and the bytes dwarf it."""

    def __init__(self, auth: PeerAuth, metrics: Metrics) -> None:
        self._auth, self._metrics = auth, metrics

    async def push(self, owner: Owner, job_id: str, peer: str, to_worker_id: str) -> int:
        """Send all committed blocks of a job; how many. They stay here as well.

        The stream's flow control holds us back when the peer is slower; only the blocks being sent
        are pinned. Raises `BlockMissing` for a job that has none, `BlockLost`, and `NotHere`,
        `JobExists`, `PoolFull` or `PeerRefused` as the peer says.
        """
        held = owner.tiers.table.lookup(job_id)
        if not held:
            raise BlockMissing(f"job {job_id} has no blocks here")
        started = time.perf_counter()
        async with channel(peer, self._auth.tls) as connection:
            stub = pb_grpc.KvPeerServiceStub(connection)
            try:
                await asyncio.wait_for(connection.channel_ready(), _CONNECT_S)
                call = stub.Import(metadata=self._auth.metadata)
                # When the peer ends the call early, its status says why.
                with contextlib.suppress(asyncio.InvalidStateError):
                    await self._send(owner, job_id, held, to_worker_id, call)
                blocks = (await call).blocks
            except grpc.aio.AioRpcError as error:
                raise self._refusal(peer, error) from error
            except TimeoutError as error:
                self._metrics.failed("peer")
                raise PeerRefused(f"no connection to {peer} in {_CONNECT_S:.0f} s") from error
        size = blocks * owner.layout.block_bytes
        self._metrics.moved("peer", "out", size, time.perf_counter() - started)
        log.info("job sent to a peer", job_id=job_id, peer=peer, blocks=blocks)
        return int(blocks)

    async def _send(
        self, owner: Owner, job_id: str, held: Held, to_worker_id: str, call: Import
    ) -> None:
        await call.write(pb.ImportRequest(header=_header(owner, job_id, held, to_worker_id)))
        # Not a byte before the peer has found room: a call that ends while it is written to may
        # lose the status it ended with.
        if ACCEPTED not in tuple(await call.initial_metadata() or ()):
            return
        for start in range(0, len(held), owner.tiers.piece):
            await self._send_blocks(owner, held[start : start + owner.tiers.piece], call)
        await call.done_writing()

    async def _send_blocks(self, owner: Owner, held: Held, call: Import) -> None:
        tiers, size = owner.tiers, owner.layout.block_bytes
        job_id = held[0][1].job_id
        blocks = await tiers.open(job_id, [index for index, _ in held])
        try:
            if blocks != [block for _, block in held]:  # committed anew since the header
                raise BlockLost(f"job {job_id} changed while it was sent")
            for block in blocks:
                assert block.slot is not None
                view = tiers.host_view(block.slot)
                for offset in range(0, size, PIECE_BYTES):
                    data = bytes(view[offset : min(offset + PIECE_BYTES, size)])
                    piece = pb.BlockPiece(block_index=block.index, offset=offset, data=data)
                    await call.write(pb.ImportRequest(piece=piece))
        finally:
            tiers.close_blocks(blocks)

    def _refusal(self, peer: str, error: grpc.aio.AioRpcError) -> KvError:
        self._metrics.failed("peer")
        kind = _REFUSALS.get(error.code(), PeerRefused)
        return kind(f"{peer}: {error.details()}")


def _header(owner: Owner, job_id: str, held: Held, to_worker_id: str) -> pb.ImportHeader:
    return pb.ImportHeader(
        to_worker_id=to_worker_id,
        job_id=job_id,
        block_bytes=owner.layout.block_bytes,
        block_size=owner.layout.block_size,
        layout=owner.layout.meaning,
        block_indexes=[index for index, _ in held],
        valid_tokens=[block.valid_tokens for _, block in held],
        checksums=[block.checksum for _, block in held],
    )
