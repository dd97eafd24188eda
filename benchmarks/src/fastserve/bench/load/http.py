"""A lean HTTP/1.1 client: asyncio streams of bytes, parsed by httptools.

A load generator must not be the bottleneck: this one spends a fraction of the time per event of a
general client, and it tells to the microsecond when bytes came.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import httptools

_CONNECT_TIMEOUT_S: Final = 30.0


class RequestError(Exception):
    """A request that got no whole answer; the message is one short sentence."""


class Sink(Protocol):
    """Takes an answer as it comes. `now` is time.perf_counter() when its bytes arrived."""

    def on_status(self, status: int) -> None: ...

    def on_body(self, body: bytes, now: float) -> None: ...


class Address:
    """Where a server is. Raises ValueError for a URL that is not http or https."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not the URL of a server, such as http://127.0.0.1:8000")
        self.tls = parts.scheme == "https"
        self.host = parts.hostname
        self.port = parts.port or (443 if self.tls else 80)
        path = parts.path.rstrip("/")
        self.prefix = path.removesuffix("/v1")  # users give the base URL of OpenAI clients, too
        self.netloc = parts.netloc.rpartition("@")[2]
        self.url = f"{parts.scheme}://{self.netloc}{self.prefix}"

    def head(self, method: str, path: str, headers: Mapping[str, str], length: int) -> bytes:
        """The bytes of a request before its body."""
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self.netloc}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines.append(f"Content-Length: {length}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._parser = httptools.HttpResponseParser(self)
        self._sink: Sink | None = None
        self._done: asyncio.Future[None] | None = None
        self._now = 0.0
        self.answered = False  # a byte of the answer under way has come
        self.usable = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.usable = True

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        self._end(RequestError("the connection was lost before the answer was complete"))

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self.answered = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._end(RequestError(f"the answer is not HTTP/1.1: {error}"))
            self.close()

    # The parser calls these from within feed_data.

    def on_headers_complete(self) -> None:
        if self._sink is not None:
            self._sink.on_status(self._parser.get_status_code())

    def on_body(self, body: bytes) -> None:
        if self._sink is not None:
            self._sink.on_body(body, self._now)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.usable = False
        self._end(None)

    def _end(self, error: RequestError | None) -> None:
        done, self._done, self._sink = self._done, None, None
        if done is not None and not done.done():
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

    async def exchange(self, request: bytes, sink: Sink) -> None:
        """Raises `RequestError`."""
        self._sink = sink
        self.answered = False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done

    def close(self) -> None:
        self.usable = False
        self._transport.abort()


class HttpClient:
    """Connections to one server, as many as there are requests under way; idle ones are reused."""

    def __init__(self, address: Address, headers: Mapping[str, str]) -> None:
        self.address = address
        self._headers = {"Accept": "*/*", "User-Agent": "fastserve-bench", **headers}
        self._tls = ssl.create_default_context() if address.tls else None
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    async def request(
        self,
        method: str,
        path: str,
        body: bytes,
        sink: Sink,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """One request to the end of its answer. Raises `RequestError`."""
        named = {**self._headers, **(headers or {})}
        if body:
            named["Content-Type"] = "application/json"
        request = self.address.head(method, path, named, len(body)) + body
        while True:
            connection = self._take_idle()
            reused = connection is not None
            if connection is None:
                connection = await self._connect()
            try:
                await connection.exchange(request, sink)
            except RequestError:
                # A server may close an idle connection in the moment in which it is used again.
                if reused and not connection.answered:
                    continue
                raise
            finally:
                if connection.usable and connection.answered and connection._done is None:
                    self._idle.append(connection)
                else:
                    connection.close()
                    self._open.discard(connection)
            return

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            self._open.discard(connection)
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        address = self.address
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    _Connection, address.host, address.port, ssl=self._tls
                )
        except TimeoutError:
            raise RequestError("the server does not accept connections") from None
        except OSError as error:
            raise RequestError(f"no connection: {error.strerror or error}") from None
        self._open.add(connection)
        return connection

    def close(self) -> None:
        for connection in self._open:
            connection.close()
        self._open.clear()
        self._idle.clear()


class Body:
    """A sink that keeps a whole answer."""

    def __init__(self) -> None:
        self.status = 0
        self.content = b""

    def on_status(self, status: int) -> None:
        self.status = status

    def on_body(self, body: bytes, now: float) -> None:
        self.content += body
