"""A proxy in front of a Redis that lets every reply wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from support.valkey import Valkey


class SlowRedis:
    """`delay_s` may be changed at any time and counts for the replies that come from then on."""

    def __init__(self, valkey: Valkey) -> None:
        self.delay_s = 0.0
        self.url = ""
        self._valkey = valkey
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        upstream, downstream = await asyncio.open_unix_connection(self._valkey.socket)
        asking = asyncio.ensure_future(_copy(reader, downstream))
        try:
            while reply := await upstream.read(65536):
                await asyncio.sleep(self.delay_s)
                writer.write(reply)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            asking.cancel()
            writer.close()
            downstream.close()
            self._tasks.discard(task)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


@contextlib.asynccontextmanager
async def slow_redis(valkey: Valkey) -> AsyncIterator[SlowRedis]:
    """Listening on a free port, without a delay at first."""
    proxy = SlowRedis(valkey)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
