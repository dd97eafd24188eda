"""KvStaging: the worker's side of the kv-offload contract."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import grpc
import structlog
import torch
from google.protobuf.message import Message

from fastserve.common.rpc import channel
from fastserve.proto.v1 import kv_offload_pb2 as pb
from fastserve.proto.v1 import kv_offload_pb2_grpc as pb_grpc
from fastserve.worker.staging.copier import Copier
from fastserve.worker.staging.host_pool import HostPool
from fastserve.worker.staging.types import (
    BlockRef,
    Copied,
    HostCopyLost,
    NoHostSpace,
    NotSent,
    Place,
    SidecarLost,
    StagingError,
)

log = structlog.get_logger(__name__)
_TIMEOUT_S = 10.0
_EXPORT_TIMEOUT_S = 30.0
_CACHE_TIMEOUT_S = 1.0  # for a piece of the cache: computing it is the other way
_RENEW_S = 1.0  # by which the sidecar knows that this process lives
_LOST = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS)
Read: TypeAlias = "grpc.aio.StreamStreamCall[pb.ReadRequest, pb.ReadResponse]"
T = TypeVar("T")


class KvStaging:
    """Stores KV blocks of jobs in the sidecar's pool and loads them back.

    All methods run on the event loop; the copies run in one thread of their own. The caller does
    not write the blocks named in `store` nor read those named in `load` until they return.
    """

    def __init__(
        self,
        address: str,
        worker_id: str,
        worker_epoch: int,
        kv: torch.Tensor,
        block_size: int,
        layout: str,
    ) -> None:
        """kv: uint8 [blocks, block_bytes]; layout: fingerprint of what the bytes mean."""
        self._channel = channel(address)
        self._stub = pb_grpc.KvOffloadServiceStub(self._channel)
        self._address = address
        self._attach_request = pb.AttachRequest(
            worker_id=worker_id,
            worker_epoch=worker_epoch,
            block_bytes=kv.shape[1],
            block_size=block_size,
            layout=layout,
        )
        self._block_bytes = kv.shape[1]
        self._device = kv.device
        self._copier = Copier(kv)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-copy")
        self._pool: HostPool | None = None
        self._sidecar_epoch = 0
        # Life of the sidecar that holds our blocks; 0 while there is none.
        self.generation = 0
        self.losses = 0  # such lives that are over
        self._attaching = asyncio.Lock()
        self._verify = True
        self._renewing: asyncio.Task[None] | None = None
        self.host_blocks = 0
        self.free_host_blocks = 0
        self.layout = layout
        self.peer = ""  # where sidecars of other groups reach ours, if they can
        self.attached: Callable[[], None] = lambda: None  # called after each `attach` that was one
        self.cached_blocks = 0  # of the prefix cache in the pool, after the last save
        self._ending: set[asyncio.Task[None]] = set()  # of reads, whose bytes have come
        self._written: tuple[list[int], list[int]] = ([], [])  # slots to be kept, checksums

    async def attach(self, timeout: float = _TIMEOUT_S) -> None:
        """Map the pool of the sidecar; raises `SidecarLost` if it does not answer in time."""
        async with self._attaching:
            if self._pool is not None:
                return
            try:
                reply = await self._stub.Attach(
                    self._attach_request, timeout=timeout, wait_for_ready=True
                )
                pool = HostPool(
                    Path(reply.pool_path), reply.pool_bytes, reply.slot_bytes, reply.slots
                )
                await self._in_thread(pool.prepare, self._device)
            except (grpc.aio.AioRpcError, OSError) as error:
                raise SidecarLost(f"{self._address}: {_reason(error)}") from error
            self._pool, self._sidecar_epoch = pool, reply.sidecar_epoch
            self.generation = reply.sidecar_epoch
            self.host_blocks = reply.capacity_blocks
            self.free_host_blocks = reply.free_blocks
            self._verify = reply.verify
            self.peer = reply.peer_address
            if self._renewing is None:
                self._renewing = asyncio.create_task(
                    self._renew(min(reply.owner_lease_seconds / 4, _RENEW_S))
                )
            log.info(
                "attached to kv-offload",
                address=self._address,
                slots=reply.slots,
                capacity_blocks=reply.capacity_blocks,
                verify=reply.verify,
            )
            self.attached()

    @property
    def peers(self) -> list[str]:
        """Where other groups can send KV to, by rank."""
        return [self.peer] if self.peer else []

    async def inventory(self) -> dict[str, int]:
        """Job id -> committed tokens, counted from block 0 without a gap."""
        await self.attach()
        reply = await self._call(self._stub.Lookup, pb.LookupRequest(**self._who()))
        held, offset = {}, 0
        for job_id, count in zip(reply.job_ids, reply.block_counts, strict=True):
            part = slice(offset, offset + count)
            held[job_id] = _contiguous(reply.block_indexes[part], reply.valid_tokens[part])
            offset += count
        self.free_host_blocks = self.host_blocks - len(reply.slots)
        return held

    async def store(self, job_id: str, blocks: Sequence[BlockRef]) -> Copied:
        """Reserve slots, copy the blocks out, commit. Raises `NoHostSpace`, `SidecarLost`."""
        started = time.perf_counter()
        pool = await self._attached()
        request = pb.ReserveRequest(
            job_id=job_id, block_indexes=[ref.index for ref in blocks], **self._who()
        )
        slots = list((await self._call(self._stub.Reserve, request)).slots)
        checksums = await self._in_thread(
            self._copier.out, pool, [ref.block for ref in blocks], slots
        )
        commit = pb.CommitRequest(
            job_id=job_id,
            slots=slots,
            valid_tokens=[ref.valid_tokens for ref in blocks],
            checksums=checksums,
            **self._who(),
        )
        self.free_host_blocks = (await self._call(self._stub.Commit, commit)).free_slots
        tokens = sum(ref.valid_tokens for ref in blocks)
        return Copied(tokens, len(slots) * self._block_bytes, time.perf_counter() - started)

    async def load(self, job_id: str, blocks: Sequence[int]) -> Copied:
        """Copy the committed blocks 0 .. len(blocks)-1 of a job into device blocks.

        Those on the disk come in pieces, each copied while the next one is read. Raises
        `HostCopyLost` if a block is missing or damaged, `SidecarLost`.
        """
        what = pb.ReadRequest(job_id=job_id, block_indexes=range(len(blocks)))
        try:
            copied = await self._read(what, blocks, _TIMEOUT_S)
        except TimeoutError as error:
            raise self._lost(error) from error
        if copied.bytes < len(blocks) * self._block_bytes:
            raise HostCopyLost(f"job {job_id}: not all of {len(blocks)} blocks came")
        return copied

    async def export(self, job_id: str, to: Place, rank: int = 0) -> Copied:
        """Send a copy of what is committed of a job to the sidecar of another worker group.

        rank: whose slice this is. Raises `NotSent`, `SidecarLost`.
        """
        started = time.perf_counter()
        await self._attached()
        peer, name = to.of(rank)
        request = pb.ExportRequest(job_ids=[job_id], peer=peer, to_worker_id=name, **self._who())
        try:
            sent = await self._stub.Export(request, timeout=_EXPORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:  # ours, of an earlier life
                raise self._lost(error) from error
            raise NotSent(f"job {job_id} to {peer}: {_reason(error)}") from error
        return Copied(0, sent.bytes, time.perf_counter() - started)

    async def save(self, blocks: Sequence[int], intact: Callable[[], Sequence[bytes]]) -> Copied:
        """Copy blocks into the prefix cache, as many of the first as there is room for.

        intact: called after the copy; the key of each block, b"" if its copy is of no use. Raises
        `NoHostSpace`, `SidecarLost`.
        """
        started = time.perf_counter()
        count = await self.copy_cached(blocks)
        keys = intact()[:count]
        await self.keep_cached(keys)
        tokens = sum(map(bool, keys)) * self._attach_request.block_size
        return Copied(tokens, count * self._block_bytes, time.perf_counter() - started)

    async def copy_cached(self, blocks: Sequence[int]) -> int:
        """The first half of `save`: how many were copied, at least one."""
        pool = await self._attached()
        request = pb.ReserveRequest(cache_blocks=len(blocks), **self._who())
        slots = list((await self._call(self._stub.Reserve, request)).slots)
        if not slots:
            raise NoHostSpace("no slot is free for the cache")
        blocks = blocks[: len(slots)]
        self._written = (slots, await self._in_thread(self._copier.out, pool, blocks, slots))
        return len(slots)

    async def keep_cached(self, keys: Sequence[bytes]) -> None:
        """The second half: the first of the blocks that were copied have these keys."""
        slots, checksums = self._written
        keys = [*keys, *[b""] * (len(slots) - len(keys))]
        commit = pb.CommitRequest(slots=slots, keys=keys, checksums=checksums, **self._who())
        reply = await self._call(self._stub.Commit, commit)
        self.free_host_blocks, self.cached_blocks = reply.free_slots, reply.cached_blocks

    async def fetch(self, keys: Sequence[bytes], blocks: Sequence[int]) -> Copied:
        """Copy the longest run of cached blocks from the first key on into the first blocks. Raises
        `HostCopyLost` if one is damaged or that takes too long, `SidecarLost`."""
        try:
            return await self._read(pb.ReadRequest(keys=keys), blocks, _CACHE_TIMEOUT_S)
        except TimeoutError as error:
            raise HostCopyLost("the cache on the host does not answer") from error

    async def _read(self, what: pb.ReadRequest, blocks: Sequence[int], timeout: float) -> Copied:
        """What comes, into the first blocks. Raises `HostCopyLost`, `SidecarLost`, `TimeoutError`
        for a piece that does not come."""
        started = time.perf_counter()
        pool = await self._attached()
        call = self._stub.Read()
        try:
            done, tokens = await self._pieces(call, pool, what, blocks, timeout)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            if await call.code() in _LOST:
                raise HostCopyLost(await call.details()) from error
            raise self._lost(error) from error
        except BaseException:
            call.cancel()
            raise
        # Nobody waits for the sidecar to hear of it: until then the blocks stay where they are.
        ending = asyncio.create_task(_end(call))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        return Copied(tokens, done * self._block_bytes, time.perf_counter() - started)

    async def _pieces(
        self,
        call: Read,
        pool: HostPool,
        what: pb.ReadRequest,
        blocks: Sequence[int],
        timeout: float,
    ) -> tuple[int, int]:
        """Blocks that came, and their tokens."""
        what.MergeFrom(pb.ReadRequest(**self._who()))
        await call.write(what)
        done = tokens = 0
        while done < len(blocks):
            piece = await asyncio.wait_for(call.read(), timeout)
            if not isinstance(piece, pb.ReadResponse):
                return done, tokens
            into = blocks[done : done + len(piece.slots)]
            checksums = piece.checksums if self._verify else None
            intact = await self._in_thread(self._copier.back, pool, piece.slots, into, checksums)
            await call.write(pb.ReadRequest(damaged=not intact))
            if not intact:
                log.error("a host copy is damaged", job_id=what.job_id or "(cache)")
                await _ended(call)
                raise HostCopyLost(f"job {what.job_id}: checksum of a host copy differs")
            done += len(piece.slots)
            tokens += sum(piece.valid_tokens)
            if what.keys:
                break  # there is one piece of the cache
        return done, tokens

    async def release(self, job_ids: Sequence[str]) -> None:
        """Free all slots of the jobs. Raises `SidecarLost`."""
        await self._attached()
        request = pb.ReleaseRequest(job_ids=job_ids, **self._who())
        self.free_host_blocks = (await self._call(self._stub.Release, request)).free_slots

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        if self._ending:
            await asyncio.wait(self._ending)
        if self._pool is not None:
            with contextlib.suppress(StagingError):
                await self._call(self._stub.Detach, pb.DetachRequest(**self._who()))
        self._pool = None
        await asyncio.to_thread(self._thread.shutdown, wait=True)
        await self._channel.close()

    def _who(self) -> dict[str, Any]:
        return {
            "worker_id": self._attach_request.worker_id,
            "worker_epoch": self._attach_request.worker_epoch,
            "sidecar_epoch": self._sidecar_epoch,
        }

    async def _attached(self) -> HostPool:
        if self._pool is None:
            await self.attach(timeout=1.0)
        assert self._pool is not None
        return self._pool

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, function, *arguments)

    async def _call(self, method: Callable[..., Awaitable[T]], request: Message) -> T:
        try:
            return await method(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise NoHostSpace(error.details()) from error
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> SidecarLost:
        """Gone, or another life of it: either way what we committed there is not there now."""
        if self._pool is not None:
            self.losses += 1
            log.warning("kv-offload is lost", address=self._address, reason=_reason(error))
        self._pool = None
        self.generation = self.free_host_blocks = 0
        return SidecarLost(f"{self._address}: {_reason(error)}")

    async def _renew(self, interval: float) -> None:
        """Keep the lease of our blocks, and say that we live; look for the next life of a sidecar
        that is lost, which others may want to reach before we need it."""
        while True:
            with contextlib.suppress(StagingError):
                if self._pool is None:
                    await self.attach(timeout=interval)
                else:
                    reply = await self._call(self._stub.Renew, pb.RenewRequest(**self._who()))
                    self.free_host_blocks = reply.free_blocks
            await asyncio.sleep(interval)


async def _end(call: Read) -> None:
    """End a call whose bytes have all been copied, whatever becomes of it."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
        await _ended(call)
    call.cancel()


async def _ended(call: Read) -> None:
    """Wait until the sidecar has heard everything. A piece may be on its way; the end is after."""
    await call.done_writing()
    async with asyncio.timeout(_TIMEOUT_S):
        while await call.read() is not grpc.aio.EOF:
            pass


def _reason(error: Exception) -> str:
    return str(error.details()) if isinstance(error, grpc.aio.AioRpcError) else str(error)


def _contiguous(indexes: Sequence[int], valid: Sequence[int]) -> int:
    tokens = 0
    for wanted, (index, count) in enumerate(zip(indexes, valid, strict=True)):
        if index != wanted:
            break
        tokens += count
    return tokens
