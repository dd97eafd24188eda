"""Rank 0 tells the other ranks which KV to copy: one TCP connection each, JSON lines.

A copy is one operation of the group: it ends when it has ended on all ranks, and it has failed if
it failed on one. A connection that breaks means that the process at its end is gone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import structlog
from torch._C._distributed_c10d import Store

from fastserve.worker.parallel.groups import Group
from fastserve.worker.staging import (
    BlockRef,
    Copied,
    HostCopyLost,
    KvStaging,
    NoHostSpace,
    NotSent,
    Place,
    SidecarLost,
)
from fastserve.worker.staging.types import StagingError

log = structlog.get_logger(__name__)
_ERRORS: dict[str, type[StagingError]] = {
    error.__name__: error for error in (NoHostSpace, HostCopyLost, NotSent, SidecarLost)
}
_LIMIT = 1 << 26  # bytes of a line: an inventory of many jobs
_START_S = 600.0


class Followers:
    """The connections, at rank 0."""

    def __init__(self, group: Group, lost: Callable[[str], None]) -> None:
        """lost: called when a connection breaks before `close`."""
        self._group, self._lost = group, lost
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._waiting: dict[tuple[int, int], asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._complete = asyncio.Event()
        self._closing = False
        self._server: asyncio.Server | None = None

    async def start(self, store: Store) -> None:
        """Returns once all ranks are connected."""
        host = "127.0.0.1" if self._group.one_host else None
        self._server = await asyncio.start_server(self._serve, host, 0, limit=_LIMIT)
        store.set("control", str(self._server.sockets[0].getsockname()[1]))
        await asyncio.wait_for(self._complete.wait(), _START_S)

    async def ask(self, **message: Any) -> list[dict[str, Any]]:
        """Send one message to all; their replies in the order of ranks."""
        number = next(self._numbers)
        line = json.dumps({"id": number, **message}).encode() + b"\n"
        answers = []
        for rank, writer in sorted(self._writers.items()):
            answer = asyncio.get_running_loop().create_future()
            self._waiting[rank, number] = answer
            writer.write(line)
            answers.append(answer)
        return list(await asyncio.gather(*answers))

    async def close(self) -> None:
        self._closing = True
        for writer in self._writers.values():
            writer.close()
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank = int(await reader.readline())
        self._writers[rank] = writer
        if len(self._writers) == self._group.size - 1:
            self._complete.set()
        while line := await _line(reader):
            reply = json.loads(line)
            self._waiting.pop((rank, reply["id"])).set_result(reply)
        if not self._closing:
            self._lost(f"rank {rank} has closed its connection")


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readline()
    except ConnectionError:
        return b""


class GroupStaging(KvStaging):
    """The staging of rank 0: what it does to its own slice of the KV cache, all ranks do.

    What some ranks stored when another could not is not counted, and replaced by the next attempt.
    """

    def __init__(self, *arguments: Any, followers: Followers) -> None:
        super().__init__(*arguments)
        self._followers = followers
        self._theirs: list[str] = []  # `peer` of the other ranks

    @property
    def peers(self) -> list[str]:
        every = [self.peer, *self._theirs]
        return every if all(every) else []

    async def attach(self, timeout: float = 10.0) -> None:
        replies = await self._all(super().attach(timeout), op="attach", timeout=timeout)
        self.host_blocks = min([self.host_blocks, *(reply["host"] for reply in replies)])
        self.attached()  # now that the others are

    async def inventory(self) -> dict[str, int]:
        own: dict[str, int] = {}

        async def take() -> None:
            own.update(await KvStaging.inventory(self))

        every = [own, *(reply["held"] for reply in await self._all(take(), op="inventory"))]
        jobs = set().union(*every)
        held = {job: min(part.get(job, 0) for part in every) for job in jobs}
        if useless := [job for job, tokens in held.items() if not tokens]:
            await self.release(useless)
        return {job: tokens for job, tokens in held.items() if tokens}

    async def store(self, job_id: str, blocks: Sequence[BlockRef]) -> Copied:
        refs = [(ref.index, ref.block, ref.valid_tokens) for ref in blocks]
        return await self._copy(super().store(job_id, blocks), op="store", job=job_id, blocks=refs)

    async def load(self, job_id: str, blocks: Sequence[int]) -> Copied:
        return await self._copy(
            super().load(job_id, blocks), op="load", job=job_id, blocks=list(blocks)
        )

    async def export(self, job_id: str, to: Place, rank: int = 0) -> Copied:
        place = {"to": to.worker_id, "peers": list(to.peers)}
        own = super().export(job_id, to, rank)
        return await self._copy(own, op="export", job=job_id, **place)

    async def copy_cached(self, blocks: Sequence[int]) -> int:
        counts: list[int] = []

        async def copy() -> None:
            counts.append(await KvStaging.copy_cached(self, blocks))

        replies = await self._all(copy(), op="copy_cached", blocks=list(blocks))
        counts += [int(reply["count"]) for reply in replies]
        return min(counts)

    async def keep_cached(self, keys: Sequence[bytes]) -> None:
        named = [key.hex() for key in keys]
        replies = await self._all(super().keep_cached(keys), op="keep_cached", keys=named)
        self.cached_blocks = min([self.cached_blocks, *(reply["cached"] for reply in replies)])

    async def fetch(self, keys: Sequence[bytes], blocks: Sequence[int]) -> Copied:
        named = [key.hex() for key in keys]
        own = super().fetch(keys, blocks)
        return await self._copy(own, op="fetch", keys=named, blocks=list(blocks))

    async def release(self, job_ids: Sequence[str]) -> None:
        await self._all(super().release(job_ids), op="release", jobs=list(job_ids))

    async def _copy(self, own: Any, **message: Any) -> Copied:
        copied: list[Copied] = []

        async def run() -> None:
            copied.append(await own)

        replies = await self._all(run(), **message)
        (mine,) = copied
        return Copied(
            min([mine.tokens, *(reply["tokens"] for reply in replies)]),
            mine.bytes + sum(reply["bytes"] for reply in replies),
            max([mine.seconds, *(reply["seconds"] for reply in replies)]),
        )

    async def _all(self, own: Any, **message: Any) -> list[dict[str, Any]]:
        """Here and everywhere; ends when all have ended. Raises the first error."""
        theirs, mine = await asyncio.gather(
            self._followers.ask(**message), own, return_exceptions=True
        )
        if isinstance(mine, BaseException):
            raise mine
        if isinstance(theirs, BaseException):
            raise theirs
        self._theirs = [reply["peer"] for reply in theirs]
        for reply in theirs:
            if reply["error"]:
                raise _ERRORS[reply["error"]](reply["reason"])
        self.free_host_blocks = min([self.free_host_blocks, *(reply["free"] for reply in theirs)])
        return list(theirs)


async def obey(group: Group, store: Store, staging: KvStaging | None) -> None:
    """At another rank: do as rank 0 says until it closes the connection."""
    port = int(store.get("control"))
    address = "127.0.0.1" if group.one_host else group.address
    reader, writer = await asyncio.open_connection(address, port, limit=_LIMIT)
    writer.write(f"{group.rank}\n".encode())

    async def answer(message: dict[str, Any]) -> None:
        reply = {"id": message["id"], **await _do(message, staging, group.rank)}
        writer.write(json.dumps(reply).encode() + b"\n")

    tasks: set[asyncio.Task[None]] = set()
    while line := await _line(reader):
        task = asyncio.create_task(answer(json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    writer.close()


async def _do(message: dict[str, Any], staging: KvStaging | None, rank: int) -> dict[str, Any]:
    assert staging is not None, "rank 0 has a sidecar and this rank has none"
    reply: dict[str, Any] = {"error": ""}
    try:
        match message["op"]:
            case "attach":
                await staging.attach(message["timeout"])
            case "inventory":
                reply["held"] = await staging.inventory()
            case "release":
                await staging.release(message["jobs"])
            case "store":
                refs = [BlockRef(*ref) for ref in message["blocks"]]
                reply |= asdict(await staging.store(message["job"], refs))
            case "load":
                reply |= asdict(await staging.load(message["job"], message["blocks"]))
            case "export":
                to = Place(message["to"], tuple(message["peers"]))
                reply |= asdict(await staging.export(message["job"], to, rank))
            case "copy_cached":
                reply["count"] = await staging.copy_cached(message["blocks"])
            case "keep_cached":
                await staging.keep_cached([bytes.fromhex(key) for key in message["keys"]])
                reply["cached"] = staging.cached_blocks
            case "fetch":
                keys = [bytes.fromhex(key) for key in message["keys"]]
                reply |= asdict(await staging.fetch(keys, message["blocks"]))
    except StagingError as error:
        reply |= {"error": type(error).__name__, "reason": str(error)}
    told = {"free": staging.free_host_blocks, "host": staging.host_blocks, "peer": staging.peer}
    return {**reply, **told}
