"""One streamed answer of the API, read while it arrives."""

from __future__ import annotations

import math
from typing import Any, Final

import orjson

from fastserve.bench.load.sse import SseParser
from fastserve.bench.load.types import Outcome

_DONE: Final = b"[DONE]"
_SHOWN: Final = 200  # characters of a server's error message


class StreamedAnswer:
    """A sink that fills an `Outcome`. `start`: time.perf_counter() at the start of the run."""

    def __init__(self, outcome: Outcome, start: float) -> None:
        self._outcome = outcome
        self._start = start
        self._status = 0
        self._parser = SseParser()
        self._refusal = b""
        self._finished = False  # a finish reason came, or [DONE]

    def on_status(self, status: int) -> None:
        self._status = status

    def on_body(self, body: bytes, now: float) -> None:
        if self._status != 200:
            self._refusal += body
            return
        for data in self._parser.feed(body):
            self._event(data, now - self._start)

    def _event(self, data: bytes, now: float) -> None:
        outcome = self._outcome
        if data == _DONE:
            self._finished = True
            return
        try:
            event: Any = orjson.loads(data)
            if event.get("error") is not None:
                outcome.error = outcome.error or f"in the stream: {error_text(event)}"
                return
            usage = event.get("usage")
            if usage:
                outcome.prompt_tokens = usage.get("prompt_tokens")
                outcome.completion_tokens = usage.get("completion_tokens")
            for choice in event.get("choices") or ():
                if _has_text(choice):
                    if math.isnan(outcome.first):
                        outcome.first = now
                    else:
                        outcome.gaps.append(now - outcome.last)
                    outcome.last = now
                    outcome.events += 1
                if choice.get("finish_reason") is not None:
                    self._finished = True
                    outcome.last = now
                    if math.isnan(outcome.first):
                        outcome.first = now
        except (orjson.JSONDecodeError, AttributeError, TypeError):
            outcome.error = outcome.error or f"not an event of this API: {shown(data)}"

    def close(self) -> None:
        """The answer has ended: note why it is not complete, if it is not."""
        outcome = self._outcome
        if self._status != 200:
            outcome.error = f"HTTP {self._status}: {refusal_text(self._refusal)}"
        elif outcome.error is None and not self._finished:
            outcome.error = "the stream ended without an end"


def _has_text(choice: dict[str, Any]) -> bool:
    """Whether a choice of an event carries some of the answer."""
    if choice.get("text"):
        return True
    delta = choice.get("delta") or {}
    return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"))


def refusal_text(body: bytes) -> str:
    """The message of an error response."""
    try:
        return error_text(orjson.loads(body))
    except (orjson.JSONDecodeError, AttributeError):
        return shown(body) or "no reason given"


def error_text(body: dict[str, Any]) -> str:
    error = body.get("error") or body.get("message") or body.get("detail")
    if isinstance(error, dict):
        error = error.get("message") or error
    return shown(str(error).encode())


def shown(data: bytes) -> str:
    """The beginning, on one line."""
    return " ".join(data.decode(errors="replace").split())[:_SHOWN]
