"""From the bytes of a request to its model: size, encoding, JSON, the words of refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from fastserve.gateway.body import parse_body, read_body
from fastserve.gateway.errors import InvalidRequestError
from fastserve.gateway.middleware import BodyLimitMiddleware
from fastserve.gateway.schemas import DetokenizeRequest, TokenizeRequest

LIMIT = 100  # bytes


def refused(body: bytes) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(body, TokenizeRequest)
    assert caught.value.status == 400
    return caught.value


def test_text_comes_as_it_was_sent() -> None:
    for text in ("é 🎈 \u2028 \x00", "\ufffd"):
        for ascii_only in (True, False):
            body = json.dumps({"prompt": text}, ensure_ascii=ascii_only).encode()
            assert parse_body(body, TokenizeRequest).prompt == text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "x",}',
        b"{'prompt': 'x'}",
        b'{"prompt": "x"} {}',
        b'{"prompt": "a\nb"}',
        b'{"prompt": NaN}',
        b"[" * 100_000,
        b'{"prompt":' * 100_000,
    ],
    ids=lambda body: str(body[:20]),
)
def test_malformed_json(body: bytes) -> None:
    error = refused(body)
    assert (error.param, error.code) == (None, "invalid_json")
    assert "not valid JSON" in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize("value", [b"[]", b'"text"', b"7", b"null", b"true"])
def test_json_that_is_no_object(value: bytes) -> None:
    error = refused(value)
    assert error.code == "invalid_json"
    assert "object" in error.message


@pytest.mark.parametrize(
    "text",
    [
        b"\xff",
        b"\xc3",  # half a character
        b"\xed\xa0\x80",  # a surrogate
        b"\xc0\xaf",  # an overlong form
        b"\xf5\x80\x80\x80",  # beyond Unicode
        rb"\ud83d",  # half an escaped pair
        "é".encode("utf-16"),
    ],
)
def test_invalid_utf8(text: bytes) -> None:
    assert refused(b'{"prompt": "' + text + b'"}').code == "invalid_json"


@given(body=st.binary(max_size=60))
def test_any_bytes_are_a_body_or_refused(body: bytes) -> None:
    try:
        parse_body(body, DetokenizeRequest)
    except InvalidRequestError as error:
        json.loads(error.body())  # it can be told to the client


def test_a_refusal_does_not_repeat_long_words_of_the_client() -> None:
    error = refused(json.dumps({"x" * 10_000: 1}).encode())
    assert error.param == "x" * 100
    assert error.code == "unknown_parameter"
    assert len(error.message) < 200
    error = refused(json.dumps({"messages": [{"role": "r" * 10_000, "content": "Hi"}]}).encode())
    assert error.param == "messages.0.role"
    assert len(error.message) < 200


def test_the_first_of_many_errors_is_told_quickly() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(json.dumps({"tokens": ["x"] * 100_000}).encode(), DetokenizeRequest)
    assert caught.value.param == "tokens.0"


def request_with(body: bytes, *content_type: str) -> Request:
    headers = [(b"content-type", value.encode()) for value in content_type]

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON "]
)
async def test_json_is_read(content_type: str) -> None:
    body = await read_body(request_with(b'{"tokens": [1]}', content_type), DetokenizeRequest)
    assert body.tokens == [1]


@pytest.mark.parametrize(
    "content_type", [[], [""], ["text/plain"], ["application/jsonx"], ["text/json"]]
)
async def test_another_media_type_is_refused(content_type: list[str]) -> None:
    with pytest.raises(InvalidRequestError, match="application/json") as caught:
        await read_body(request_with(b"{}", *content_type), TokenizeRequest)
    assert caught.value.status == 415


async def upload(parts: Sequence[bytes], length: int | None) -> tuple[list[Message], list[bytes]]:
    """What the client is answered, and what the application read of its body."""
    read: list[bytes] = []
    answer: list[Message] = []
    waiting = list(parts)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        more = True
        while more:
            message = await receive()
            read.append(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: Message) -> None:
        answer.append(message)

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "headers": headers, "state": {}}
    await BodyLimitMiddleware(application, LIMIT)(scope, receive, send)
    return answer, read


@pytest.mark.parametrize("parts", [[b"x" * LIMIT], [b"x" * 60, b"", b"x" * 40], [b""]])
@pytest.mark.parametrize("told", [True, False])
async def test_a_body_of_the_limit_passes(parts: list[bytes], told: bool) -> None:
    answer, read = await upload(parts, sum(map(len, parts)) if told else None)
    assert read == parts
    assert answer[0]["status"] == 200


async def test_a_body_that_is_told_to_be_too_large_is_not_read() -> None:
    answer, read = await upload([b"x" * (LIMIT + 1)], LIMIT + 1)
    assert read == []
    assert answer[0]["status"] == 413
    error = json.loads(answer[1]["body"])["error"]
    assert error["code"] == "request_too_large"
    assert str(LIMIT) in error["message"]


async def test_a_body_is_cut_off_where_it_becomes_too_large() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await upload([b"x" * LIMIT, b"x", b"never asked for"], None)
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")
