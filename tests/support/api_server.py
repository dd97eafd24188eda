"""A small server with OpenAI's API whose answers a test scripts. As a process: see `main`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

MODEL = "fake-model"


@dataclass
class Answer:
    """What a request gets. `status` other than 200: an error body with `text`."""

    tokens: int = 4
    text: str = "word "
    status: int = 200
    pause_s: float = 0.0  # before each token
    gate: asyncio.Event | None = None  # waited for before the first byte
    usage: bool = True
    finish: bool = True  # say why it ended, and [DONE]
    error_at: int | None = None  # an error event in the place of this token
    cut_at: int | None = None  # the connection closes before this token


Script = Callable[[dict[str, Any]], Answer]


def as_asked(body: dict[str, Any]) -> Answer:
    """As many tokens as the request wants."""
    return Answer(tokens=body["max_tokens"])


@dataclass
class ApiServer:
    """HTTP/1.1 with keep-alive and chunks. Prompts have a token per word, and one more."""

    script: Script = as_asked
    tokenize: bool = True
    drop_reused: bool = False  # close a connection when a second answer is asked for on it
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    serving: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        serving = asyncio.ensure_future(self._serve(reader, writer))
        self.serving.add(serving)
        serving.add_done_callback(self.serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                answers = len(self.bodies)
                while await self._exchange(reader, writer):
                    if self.drop_reused and len(self.bodies) > answers:
                        await reader.readuntil(b"\r\n\r\n")
                        return
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(content) if content else {}
        if path == "/v1/models":
            _whole(writer, 200, {"object": "list", "data": [{"id": MODEL, "max_model_len": 512}]})
        elif path == "/health":
            _whole(writer, 200, {})
        elif path == "/tokenize" and self.tokenize:
            _whole(writer, 200, {"tokens": [0] * _tokens(body["prompt"])})
        elif path in ("/v1/completions", "/v1/chat/completions") and method == "POST":
            self.bodies.append(body)
            self.headers.append(headers)
            return await self._stream(writer, body, chat="chat" in path)
        else:
            _whole(writer, 404, {"error": {"message": f"there is no {path}"}})
        await writer.drain()
        return True

    async def _stream(
        self, writer: asyncio.StreamWriter, body: dict[str, Any], *, chat: bool
    ) -> bool:
        answer = self.script(body)
        if answer.gate is not None:
            await answer.gate.wait()
        if answer.status != 200:
            _whole(writer, answer.status, {"error": {"message": answer.text}})
            await writer.drain()
            return True
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for at in range(answer.tokens):
            await asyncio.sleep(answer.pause_s)
            if at == answer.cut_at:
                return False
            if at == answer.error_at:
                _event(writer, {"error": {"message": answer.text, "code": "server_error"}})
                break
            ends = answer.finish and at == answer.tokens - 1
            _event(writer, _chunk(answer.text, "length" if ends else None, chat=chat))
            await writer.drain()
        if answer.usage:
            text = body["messages"][0]["content"] if chat else body["prompt"]
            usage = {"prompt_tokens": _tokens(text), "completion_tokens": answer.tokens}
            _event(writer, {"choices": [], "usage": usage})
        if answer.finish:
            _send(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def _tokens(text: str) -> int:
    return len(text.split()) + 1


def _chunk(text: str, reason: str | None, *, chat: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
    return {"choices": [{"index": 0, **said, "finish_reason": reason}]}


def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    _send(writer, b"data: " + json.dumps(event).encode() + b"\n\n")


def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _whole(writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


@contextlib.asynccontextmanager
async def running_api_server(script: Script = as_asked, **fields: Any) -> AsyncIterator[ApiServer]:
    """Listening on a free port."""
    api = ApiServer(script, **fields)
    server = await asyncio.start_server(api.serve, "127.0.0.1", 0)
    api.port = server.sockets[0].getsockname()[1]
    try:
        yield api
    finally:
        server.close()
        for task in list(api.serving):
            task.cancel()
        await asyncio.gather(*api.serving, return_exceptions=True)


async def main(port: int) -> None:
    """Serve on a port until killed."""
    server = await asyncio.start_server(ApiServer().serve, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
