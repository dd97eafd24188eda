"""`fastserve chat`: a client of the API that streams."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import httpx

from fastserve.cli.errors import CliError

_TIMEOUT = httpx.Timeout(10.0, read=600.0)  # a preempted answer may be silent for long
_LOOPBACK = ("127.0.0.1", "::1", "localhost")  # no proxy is asked for these


class Chat:
    """A conversation. Used as a context manager."""

    def __init__(
        self, url: str, api_key: str | None, model: str | None, system: str | None = None
    ) -> None:
        """`model` None: the first one that the server has. Raises `CliError` for no URL."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise CliError(f"{url} is not an address: {error}") from error
        if address.scheme not in ("http", "https"):
            raise CliError(f"{url} is not an address: it must begin with http:// or https://")
        self._client = httpx.Client(
            base_url=address,
            headers=headers,
            timeout=_TIMEOUT,
            trust_env=address.host not in _LOOPBACK,
        )
        self._model = model
        self._messages = [{"role": "system", "content": system}] if system else []

    def __enter__(self) -> Chat:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def ask(
        self, text: str, *, max_tokens: int | None = None, temperature: float | None = None
    ) -> Iterator[str]:
        """Pieces of the answer as they come; question and answer join the conversation.

        Raises `CliError`.
        """
        question = {"role": "user", "content": text}
        body: dict[str, Any] = {"messages": [*self._messages, question], "stream": True}
        try:
            body["model"] = self._model = self._model or self._first_model()
            body |= {} if max_tokens is None else {"max_tokens": max_tokens}
            body |= {} if temperature is None else {"temperature": temperature}
            answer = ""
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise CliError(_message(response))
                for piece in _pieces(response.iter_lines()):
                    answer += piece
                    yield piece
        except httpx.ConnectError as error:
            raise CliError(
                f"nothing answers at {self._url}: start it with `fastserve up`, or give --url"
            ) from error
        except httpx.HTTPError as error:
            raise CliError(f"the connection to {self._url} broke: {error}") from error
        self._messages += [question, {"role": "assistant", "content": answer}]

    def _first_model(self) -> str:
        response = self._client.get("/v1/models")
        if response.status_code != 200:
            raise CliError(_message(response))
        models = response.json()["data"]
        if not models:
            raise CliError("the server has no model yet: `fastserve status` says when it is ready")
        return str(models[0]["id"])


def print_answer(pieces: Iterator[str]) -> None:
    """Write an answer to the terminal as it comes."""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """Text of a chat stream. Raises `CliError` for an error within it."""
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue  # ids and pings
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise CliError(event["error"]["message"])
        for choice in event["choices"]:
            if piece := choice["delta"].get("content"):
                yield piece


def _message(response: httpx.Response) -> str:
    try:
        return f"{response.json()['error']['message']} (HTTP {response.status_code})"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}: {response.text[:200]}"
