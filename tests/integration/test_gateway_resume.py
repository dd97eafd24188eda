"""A stream that broke goes on at any gateway: the rest of the text, as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fastserve.gateway.tokenizer import Tokenizer
from support.fake_scheduler import MODEL, Script, Stack, running_gateway

TEXT = "  Hello, wörld! 😀🎉 naïve 日本語 END of it"


@pytest.fixture
async def stack(default_model_folder: Path, default_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    async with running_gateway(default_model_folder, default_tokenizer) as running:
        yield running


async def events(
    stack: Stack, body: dict[str, Any], headers: dict[str, str] | None = None
) -> list[tuple[str, Any]]:
    """(id, data) of every event but the last, which is [DONE]."""
    response = await stack.http.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    found = []
    last_id = ""
    for line in response.text.splitlines():
        if line.startswith("id: "):
            last_id = line.removeprefix("id: ")
        elif line.startswith("data: {"):
            found.append((last_id, json.loads(line.removeprefix("data: "))))
    assert response.text.endswith("data: [DONE]\n\n")
    return found


def texts(found: list[tuple[str, Any]], choices: int) -> list[str]:
    out = [""] * choices
    for _, data in found:
        for choice in data["choices"]:
            out[choice["index"]] += choice["text"]
    return out


@pytest.mark.parametrize("per_batch", [1, 3, 100])
@pytest.mark.parametrize("more", [{}, {"stop": ["END"]}, {"logprobs": 0}])
async def test_from_every_event_on(stack: Stack, per_batch: int, more: dict[str, Any]) -> None:
    stack.says(TEXT)
    body = {"model": MODEL, "prompt": "Once", "stream": True, "max_tokens": 60, **more}
    body["stream_options"] = {"include_usage": True}
    whole = await events(stack, body)
    answer = whole[0][1]["id"]
    stack.says(TEXT, per_batch=per_batch)  # tokens come in other portions than before
    for count in range(1, len(whole)):
        headers = {"X-FastServe-Answer": answer, "Last-Event-ID": whole[count - 1][0]}
        rest = await events(stack, body, headers)
        joined = texts(whole[:count], 1)[0] + texts(rest, 1)[0]
        assert joined == texts(whole, 1)[0], f"after event {count}"
        assert rest[-1][1]["usage"] == whole[-1][1]["usage"]
        assert rest[-2][1]["choices"][0]["finish_reason"] == "stop"
        assert {data["id"] for _, data in rest} == {answer}
    assert len(stack.scheduler.submits) == 1, "nothing was computed twice"


async def test_choices_go_on_separately(stack: Stack) -> None:
    words = ["one two three four", "uno dos tres cuatro cinco seis"]

    def reply(submit: Any) -> Script:
        return stack.script(words[int(submit.job_id.rpartition(".")[2])])

    stack.scheduler.reply = reply
    body = {"model": MODEL, "prompt": "Count", "n": 2, "stream": True, "max_tokens": 60}
    whole = await events(stack, body)
    answer = whole[0][1]["id"]
    assert texts(whole, 2) == words
    middle = len(whole) // 2
    headers = {"X-FastServe-Answer": answer, "Last-Event-ID": whole[middle][0]}
    rest = await events(stack, body, headers)
    begun = texts(whole[: middle + 1], 2)
    assert [a + b for a, b in zip(begun, texts(rest, 2), strict=True)] == words
    # Without the id of an event: from the beginning.
    again = await events(stack, body, {"X-FastServe-Answer": answer})
    assert texts(again, 2) == words


@pytest.mark.parametrize(
    ("headers", "change", "status", "param"),
    [
        ({"X-FastServe-Answer": "cmpl-" + "0" * 32 + "-0"}, {}, 404, None),
        ({"X-FastServe-Answer": "../../etc"}, {}, 400, "x-fastserve-answer"),
        (
            {"X-FastServe-Answer": "cmpl-" + "0" * 32 + "-0", "Last-Event-ID": "1,2"},
            {},
            400,
            "last-event-id",
        ),
        (
            {"X-FastServe-Answer": "cmpl-" + "0" * 32 + "-0", "Last-Event-ID": "x"},
            {},
            400,
            "last-event-id",
        ),
        ({"X-FastServe-Answer": "cmpl-" + "0" * 32 + "-0"}, {"stream": False}, 400, "stream"),
    ],
)
async def test_what_cannot_be_gone_on_with(
    stack: Stack, headers: dict[str, str], change: dict[str, Any], status: int, param: str | None
) -> None:
    body = {"model": MODEL, "prompt": "Once", "stream": True, **change}
    response = await stack.http.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
    assert not stack.scheduler.submits
