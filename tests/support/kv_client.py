"""A worker's side of the kv-offload contract, for tests: calls with the epochs filled in, and
blocks whose bytes say whose they are."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
import xxhash

from fastserve.common.rpc import channel
from fastserve.proto.v1 import kv_offload_pb2 as pb
from fastserve.proto.v1 import kv_offload_pb2_grpc as pb_grpc
from support.processes import Running
from support.waiting import eventually_async

Stub: TypeAlias = "pb_grpc.KvOffloadServiceAsyncStub"
BLOCK_BYTES = 5000
TOKENS = 16


def attach(
    epoch: int = 1, layout: str = "l", worker: str = "w", size: int = BLOCK_BYTES
) -> pb.AttachRequest:
    return pb.AttachRequest(
        worker_id=worker, worker_epoch=epoch, block_bytes=size, block_size=TOKENS, layout=layout
    )


async def refused(call: Awaitable[object], code: grpc.StatusCode, why: str | None = None) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=why) as caught:
        await call
    assert caught.value.code() is code


def content(job: str, index: int, size: int = BLOCK_BYTES) -> bytes:
    """Bytes that no other block has."""
    seed = f"{job}/{index}/".encode()
    return (seed * (size // len(seed) + 1))[:size]


class Caller:
    """One life of a worker, attached."""

    def __init__(self, stub: Stub, attached: pb.AttachResponse, epoch: int = 1, worker: str = "w"):
        self.stub, self.attached = stub, attached
        self.who: dict[str, Any] = {
            "worker_id": worker,
            "worker_epoch": epoch,
            "sidecar_epoch": attached.sidecar_epoch,
        }
        fd = os.open(attached.pool_path, os.O_RDWR)
        self._pool = mmap.mmap(fd, attached.pool_bytes)
        os.close(fd)

    def bytes_of(self, slot: int, size: int = BLOCK_BYTES) -> bytes:
        start = slot * self.attached.slot_bytes
        return self._pool[start : start + size]

    def overwrite(self, slot: int, data: bytes) -> None:
        start = slot * self.attached.slot_bytes
        self._pool[start : start + len(data)] = data

    async def reserve(self, job: str, *indexes: int) -> list[int]:
        request = pb.ReserveRequest(job_id=job, block_indexes=indexes, **self.who)
        return list((await self.stub.Reserve(request)).slots)

    async def commit(
        self, job: str, slots: list[int], tokens: list[int], checksums: Sequence[int] = ()
    ) -> None:
        await self.stub.Commit(
            pb.CommitRequest(
                job_id=job,
                slots=slots,
                valid_tokens=tokens,
                checksums=checksums or [2**64 - 1] * len(slots),
                **self.who,
            )
        )

    async def store(self, job: str, count: int, size: int = BLOCK_BYTES, first: int = 0) -> None:
        """`count` blocks of a job from `first`, as a worker stores them."""
        indexes = range(first, first + count)
        slots = await self.reserve(job, *indexes)
        data = [content(job, index, size) for index in indexes]
        for slot, block in zip(slots, data, strict=True):
            self.overwrite(slot, block)
        checksums = [xxhash.xxh3_64_intdigest(block) for block in data]
        await self.commit(job, slots, [TOKENS] * count, checksums)

    async def load(self, job: str, count: int, size: int = BLOCK_BYTES) -> int:
        """Read blocks 0 .. count-1, and compare every byte; in how many pieces they came."""
        pieces = await self.read(job, *range(count), size=size)
        return len(pieces)

    @contextlib.asynccontextmanager
    async def reading(self, job: str, *indexes: int) -> AsyncIterator[Reading]:
        """A read under way; leaving the block breaks it off."""
        call = self.stub.Read()
        await call.write(pb.ReadRequest(job_id=job, block_indexes=indexes, **self.who))
        try:
            yield Reading(call)
        finally:
            call.cancel()

    async def read(self, job: str, *indexes: int, size: int | None = None) -> list[pb.ReadResponse]:
        """All pieces of a read; with `size` the bytes are compared with `content`."""
        pieces: list[pb.ReadResponse] = []
        async with self.reading(job, *indexes) as reading:
            while sum(len(piece.slots) for piece in pieces) < len(indexes):
                piece = await reading.piece()
                for index, slot in zip(piece.block_indexes, piece.slots, strict=True):
                    assert size is None or self.bytes_of(slot, size) == content(job, index, size)
                pieces.append(piece)
                await reading.acknowledge()
            await reading.end()
        assert [index for piece in pieces for index in piece.block_indexes] == list(indexes)
        return pieces

    async def lookup(self, *jobs: str) -> pb.LookupResponse:
        return await self.stub.Lookup(pb.LookupRequest(job_ids=jobs, **self.who))

    async def release(self, *jobs: str) -> pb.ReleaseResponse:
        return await self.stub.Release(pb.ReleaseRequest(job_ids=jobs, **self.who))

    async def stats(self) -> pb.StatsResponse:
        return await self.stub.Stats(pb.StatsRequest())

    async def until(
        self, check: Callable[[pb.StatsResponse], object], what: str
    ) -> pb.StatsResponse:
        """Wait until the statistics are as wanted."""
        stats = await self.stats()

        async def now() -> bool:
            nonlocal stats
            stats = await self.stats()
            return bool(check(stats))

        await eventually_async(now, what)
        return stats


class Reading:
    """A Read call in the hands of a test."""

    def __init__(self, call: grpc.aio.StreamStreamCall[pb.ReadRequest, pb.ReadResponse]) -> None:
        self._call = call

    async def piece(self) -> pb.ReadResponse:
        piece = await asyncio.wait_for(self._call.read(), 20)
        assert isinstance(piece, pb.ReadResponse), "the stream ended"
        return piece

    async def acknowledge(self, damaged: bool = False) -> None:
        """Raises the error of the call if the sidecar has ended it while the piece was read."""
        try:
            await self._call.write(pb.ReadRequest(damaged=damaged))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # A write to an ended call fails with INTERNAL or a wrong state: its status tells why.
            await asyncio.wait_for(self._call.read(), 20)
            raise

    async def end(self) -> None:
        """The sidecar has taken note of everything."""
        await self._call.done_writing()
        while await asyncio.wait_for(self._call.read(), 20) is not grpc.aio.EOF:
            pass  # a piece that was on its way; the status comes after it
        assert await asyncio.wait_for(self._call.code(), 20) is grpc.StatusCode.OK


@contextlib.asynccontextmanager
async def attached(
    sidecar: Running, epoch: int = 1, worker: str = "w", size: int = BLOCK_BYTES
) -> AsyncIterator[Caller]:
    """A connection to a sidecar."""
    async with channel(sidecar.info["address"]) as connection:
        stub: Stub = pb_grpc.KvOffloadServiceStub(connection)
        reply = await stub.Attach(attach(epoch, worker=worker, size=size))
        yield Caller(stub, reply, epoch, worker)


def scratch(folder: Path) -> list[Path]:
    """Files of sidecars in a folder."""
    return sorted(folder.glob("fastserve-kv*"))
