"""Streamed completions as a client sees them, with the time of every piece."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from support.deployment import MODEL

TIMEOUT = httpx.Timeout(10.0, read=90.0, pool=90.0)


@dataclass
class Answer:
    """One streamed completion."""

    response_id: str = ""
    text: str = ""
    pieces: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # SSE ids: index of the last token of a piece
    finish: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    started: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    error: dict[str, Any] | None = None
    progress: asyncio.Event = field(default_factory=asyncio.Event)

    async def reached(self, pieces: int, timeout: float = 60.0) -> None:
        """Wait until so many pieces came."""
        async with asyncio.timeout(timeout):
            while len(self.pieces) < pieces:
                assert not self.ended, f"ended after {len(self.pieces)} pieces: {self}"
                self.progress.clear()
                await self.progress.wait()


def body_of(prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    """Greedy, of a known length, with usage."""
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }


async def stream(
    client: httpx.AsyncClient,
    body: dict[str, Any],
    answer: Answer,
    headers: dict[str, str] | None = None,
    *,
    refusals: bool = False,
) -> Answer:
    """Fill `answer` as it comes. refusals: another status than 200 is its error, not a failure."""
    answer.started = time.monotonic()
    try:
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            if refusals and response.status_code != 200:
                answer.error = json.loads(await response.aread())["error"]
                return answer
            assert response.status_code == 200, (await response.aread()).decode()
            async for line in response.aiter_lines():
                _take(line, answer)
    finally:
        answer.ended = time.monotonic()
        answer.progress.set()
    return answer


def _take(line: str, answer: Answer) -> None:
    if line.startswith("id: "):
        answer.ids.append(int(line.removeprefix("id: ")))
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        answer.error = event["error"]
        return
    answer.response_id = event["id"]
    answer.usage = event.get("usage") or answer.usage
    for choice in event["choices"]:
        answer.finish = choice["finish_reason"] or answer.finish
        if choice["text"]:
            answer.first = answer.first or time.monotonic()
            answer.pieces.append(choice["text"])
            answer.text += choice["text"]
            answer.progress.set()
