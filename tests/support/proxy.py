"""A TCP proxy that can drop every connection, or take none for a while."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from support.waiting import eventually

_CHUNK = 65536


class Proxy:
    """Listens on `address` and passes bytes on to `target`, both host:port."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.address = ""
        self.connections = 0  # ever taken
        self._refusing = False
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self.drop()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def connected(self, times: int) -> None:
        """Wait until so many connections were taken."""
        await eventually(lambda: self.connections >= times, "another connection")

    def drop(self, *, refuse: bool = False) -> None:
        """Close all sockets at once, as a network does; refuse: new ones too, until `drop()`."""
        self._refusing = refuse
        for writer in self._open:
            writer.transport.abort()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        self.connections += 1
        host, _, port = self.target.rpartition(":")
        try:
            onward = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, onward[1]}
        for source, sink in ((reader, onward[1]), (onward[0], writer)):
            task = asyncio.ensure_future(self._pass(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK):
                sink.write(data)
                await sink.drain()
        sink.transport.abort()
        self._open.discard(sink)
