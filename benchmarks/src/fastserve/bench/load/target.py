"""The server that is measured: what it serves, and how it is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from fastserve.bench.load.answer import StreamedAnswer, refusal_text
from fastserve.bench.load.http import Body, HttpClient, RequestError
from fastserve.bench.load.types import LoadRequest, Outcome

COMPLETIONS: Final = "completions"
CHAT: Final = "chat"
ENDPOINTS: Final = {COMPLETIONS: "/v1/completions", CHAT: "/v1/chat/completions"}
_ASK_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Asking:
    """What all requests of a run have in common. `extra`: further fields of the body."""

    endpoint: str = COMPLETIONS
    ignore_eos: bool = False
    temperature: float | None = 0.0
    timeout_s: float = 600.0
    extra: Mapping[str, Any] = field(default_factory=dict)


class Target:
    """A model on a server."""

    def __init__(self, http: HttpClient, model: str, asking: Asking) -> None:
        self.http = http
        self.model = model
        self.asking = asking
        self.max_model_len: int | None = None

    @classmethod
    async def find(cls, http: HttpClient, model: str | None, asking: Asking) -> Target:
        """The model of that name, or the first one. Raises `RequestError`."""
        reply = await ask(http, "GET", "/v1/models")
        cards = reply.get("data") or []
        names = [str(card.get("id")) for card in cards]
        if model is None:
            if not names:
                raise RequestError(f"{http.address.url} serves no model: name one with --model")
            model = names[0]
        elif names and model not in names:
            known = ", ".join(names)
            raise RequestError(f"{http.address.url} does not serve {model!r}, it serves {known}")
        target = cls(http, model, asking)
        for card in cards:
            if card.get("id") == model and isinstance(card.get("max_model_len"), int):
                target.max_model_len = card["max_model_len"]
        return target

    def body(self, prompt: str, max_tokens: int) -> bytes:
        """A streamed request."""
        asking = self.asking
        body: dict[str, Any] = {"model": self.model}
        if asking.endpoint == CHAT:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        body |= {
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if asking.temperature is not None:
            body["temperature"] = asking.temperature
        if asking.ignore_eos:
            body["ignore_eos"] = True
        return orjson.dumps({**body, **asking.extra})

    async def run(self, request: LoadRequest, due: float, start: float) -> Outcome:
        """Send one request now and follow it to its end; failures are in the outcome.

        `due` in seconds after `start`, which is a value of time.perf_counter().
        """
        body = self.body(request.prompt, request.max_tokens)
        outcome = Outcome(request, due, time.perf_counter() - start)
        answer = StreamedAnswer(outcome, start)
        path = ENDPOINTS[self.asking.endpoint]
        try:
            async with asyncio.timeout(self.asking.timeout_s):
                await self.http.request("POST", path, body, answer, request.headers)
            answer.close()
        except RequestError as error:
            outcome.error = outcome.error or str(error)
        except TimeoutError:
            outcome.error = f"no complete answer after {self.asking.timeout_s:g} s"
        outcome.end = time.perf_counter() - start
        return outcome


async def ask(http: HttpClient, method: str, path: str, body: Any = None) -> dict[str, Any]:
    """A JSON object from the server. Raises `RequestError`, with the status if it refuses."""
    reply = Body()
    data = b"" if body is None else orjson.dumps(body)
    try:
        async with asyncio.timeout(_ASK_TIMEOUT_S):
            await http.request(method, path, data, reply)
    except TimeoutError:
        raise RequestError(f"{http.address.url}{path} does not answer") from None
    except RequestError as error:
        raise RequestError(f"{http.address.url}{path}: {error}") from None
    if reply.status != 200:
        why = refusal_text(reply.content)
        raise RequestError(f"{http.address.url}{path}: HTTP {reply.status}: {why}")
    try:
        found = orjson.loads(reply.content)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise RequestError(f"{http.address.url}{path} does not answer with a JSON object")
    return found
