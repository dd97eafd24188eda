"""Answers of the gateway over real HTTP: whole and streamed, exact in text, ids and counts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fastserve.gateway.tokenizer import Tokenizer
from fastserve.proto.v1 import sampling_pb2, scheduler_pb2
from support.fake_scheduler import EOS, MODEL, UNFINISHED, Script, Stack, running_gateway
from support.waiting import eventually

TEXT = "  Hello, wörld! 😀🎉 naïve 日本語 <b>&amp;</b>\n\tend"


@pytest.fixture
async def stack(default_model_folder: Path, default_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    async with running_gateway(default_model_folder, default_tokenizer) as running:
        yield running


def tokens_of(stack: Stack, text: str) -> list[int]:
    return stack.service.gateway.tokenizer.encode(text, add_special_tokens=False)


def events_of(stream: str) -> list[tuple[str | None, Any]]:
    """(id, data) of every event; comments are left out."""
    assert stream.endswith("\n\n")
    events = []
    for block in stream.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line[0] != ":")
        if fields:
            data = fields["data"]
            events.append((fields.get("id"), data if data == "[DONE]" else json.loads(data)))
    return events


def chunks_of(stream: str) -> list[Any]:
    """The data of all events; the last one must be [DONE]."""
    events = [data for _, data in events_of(stream)]
    assert events.pop() == "[DONE]"
    return events


async def test_chat_answer(stack: Stack) -> None:
    stack.says(TEXT)
    response = await stack.chat("What?")
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == MODEL
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "stop"
    (submit,) = stack.scheduler.submits
    count = len(tokens_of(stack, TEXT)) + 1
    assert body["usage"] == {
        "prompt_tokens": len(submit.prompt_token_ids),
        "completion_tokens": count,
        "total_tokens": len(submit.prompt_token_ids) + count,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    prompt = stack.service.gateway.tokenizer.encode_chat([{"role": "user", "content": "What?"}])
    assert list(submit.prompt_token_ids) == prompt
    assert submit.sampling.max_tokens == 200 - len(prompt)
    assert not submit.sampling.HasField("logprobs")


async def test_chat_stream_gives_the_same_text(stack: Stack) -> None:
    stack.says(TEXT)
    response = await stack.chat(stream=True)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    chunks = chunks_of(response.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == TEXT
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) > 10, "it is streamed, not sent at the end"


async def test_event_ids_are_token_indexes(stack: Stack) -> None:
    stack.says("😀 one two")
    events = events_of((await stack.chat(stream=True)).text)
    ids = [int(event_id) for event_id, data in events if event_id is not None]
    assert ids == sorted(set(ids))
    # The emoji takes several tokens and has no event before the last of them.
    emoji = len(tokens_of(stack, "😀"))
    assert emoji > 1
    assert ids[0] >= emoji - 1  # more if tokens after it came in the same read
    assert ids[-1] == len(tokens_of(stack, "😀 one two"))
    assert all(event_id is not None for event_id, data in events if data != "[DONE]")


async def test_usage_chunk(stack: Stack) -> None:
    stack.says("one two")
    response = await stack.chat(stream=True, stream_options={"include_usage": True})
    *chunks, last = chunks_of(response.text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(tokens_of(stack, "one two")) + 1
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_cached_tokens_of_prompts_and_choices(stack: Stack) -> None:
    """Of each prompt what all of its choices found, so never more than it has."""
    cached = iter([0, 48, 16, 32])

    def reply(_: scheduler_pb2.Submit) -> Script:
        return stack.script("one", cached=next(cached))

    stack.scheduler.reply = reply
    body = (await stack.complete(["Once", "Then"], n=2)).json()
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0 + 16}
    stack.says("one two", cached=48)
    response = await stack.chat(stream=True, stream_options={"include_usage": True})
    last = chunks_of(response.text)[-1]
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 48}


async def test_completion(stack: Stack) -> None:
    stack.says(" there was a king", finish=sampling_pb2.FINISH_REASON_LENGTH)
    body = (await stack.complete("Once upon a time")).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    (choice,) = body["choices"]
    assert choice["text"] == " there was a king"
    assert choice["finish_reason"] == "length"
    (submit,) = stack.scheduler.submits
    assert list(submit.prompt_token_ids) == tokens_of(stack, "Once upon a time")
    assert submit.sampling.max_tokens == 16


async def test_completion_stream_with_echo(stack: Stack) -> None:
    stack.says(" was")
    response = await stack.complete("There", echo=True, stream=True)
    texts = [chunk["choices"][0]["text"] for chunk in chunks_of(response.text)]
    assert texts[0].startswith("There")
    assert "".join(texts) == "There was"


async def test_several_prompts_and_choices(stack: Stack) -> None:
    texts = [" a", " b", " c", " d"]

    def reply(submit: scheduler_pb2.Submit) -> Script:
        index = int(submit.job_id.rpartition(".")[2])
        return Script(tokens=[*tokens_of(stack, texts[index]), EOS])

    stack.scheduler.reply = reply
    prompt = tokens_of(stack, "Second prompt")
    body = (await stack.complete([[19556], prompt], n=2, seed=7, echo=True)).json()
    shown = [(choice["index"], choice["text"]) for choice in body["choices"]]
    first = stack.service.gateway.tokenizer.decode([19556])
    assert shown == [
        (0, first + " a"),
        (1, first + " b"),
        (2, "Second prompt c"),
        (3, "Second prompt d"),
    ]
    assert body["usage"]["prompt_tokens"] == 1 + len(prompt)
    submits = sorted(stack.scheduler.submits, key=lambda submit: submit.job_id)
    assert [submit.sampling.seed for submit in submits] == [7, 8, 7, 8]


async def test_choices_of_a_stream(stack: Stack) -> None:
    stack.says("one two three")
    response = await stack.chat(stream=True, n=2)
    texts = {0: "", 1: ""}
    ends = {}
    for event_id, data in events_of(response.text):
        if data == "[DONE]":
            continue
        (choice,) = data["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
        last_id = event_id
    assert texts == {0: "one two three", 1: "one two three"}
    assert ends == {0: "stop", 1: "stop"}
    count = len(tokens_of(stack, "one two three"))
    assert last_id == f"{count},{count}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("per_batch", [1, 100])
async def test_stop_string_across_tokens(stack: Stack, stream: bool, per_batch: int) -> None:
    said = "Count: one, two, three, four"
    stop = "wo, thr"
    stack.says(said, per_batch=per_batch)
    response = await stack.chat(stop=[stop, "never"], stream=stream)
    if stream:
        chunks = chunks_of(response.text)
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        # Counted up to the token that completes the stop string, however they arrived.
        usage = response.json()["usage"]["completion_tokens"]
        tokenizer = stack.service.gateway.tokenizer
        tokens = tokens_of(stack, said)
        assert stop in tokenizer.decode(tokens[:usage])
        assert stop not in tokenizer.decode(tokens[: usage - 1])
    assert text == "Count: one, t"
    assert reason == "stop"


async def test_stop_string_ends_one_choice_and_not_the_other(stack: Stack) -> None:
    gate = asyncio.Event()

    def reply(submit: scheduler_pb2.Submit) -> Script:
        if submit.job_id.endswith(".0"):
            return Script(tokens_of(stack, "one two three"), UNFINISHED)
        return stack.script("four", gate=gate)

    stack.scheduler.reply = reply
    asking = asyncio.ensure_future(stack.chat(stop="two", n=2))
    await eventually(lambda: stack.scheduler.cancelled, "the cancel")
    assert not asking.done()
    gate.set()
    first, second = (await asking).json()["choices"]
    assert (first["message"]["content"], first["finish_reason"]) == ("one ", "stop")
    assert second["message"]["content"] == "four"
    assert [job_id[-2:] for job_id in stack.scheduler.cancelled] == [".0"]


async def test_stop_strings_count_after_min_tokens(stack: Stack) -> None:
    stack.says("two one two one")
    body = (await stack.chat(stop="two", min_tokens=2)).json()
    assert body["choices"][0]["message"]["content"] == "two one "


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_stop_where_the_text_does(stack: Stack, stream: bool) -> None:
    tokens = tokens_of(stack, "one two three")
    stack.says("one two three", logprobs=[(-1.0, [], [])] * (len(tokens) + 1))
    response = await stack.chat(stop=" two three", logprobs=True, stream=stream)
    parts = chunks_of(response.text) if stream else [response.json()]
    shown = [part["choices"][0]["logprobs"] or {"content": []} for part in parts]
    assert [entry["token"] for part in shown for entry in part["content"]] == ["one"]


async def test_stop_token_is_no_text(stack: Stack) -> None:
    tokens = tokens_of(stack, "one two three")
    stack.scheduler.reply = Script(tokens=tokens)
    response = await stack.chat(stop_token_ids=[tokens[-1]])
    body = response.json()
    assert body["choices"][0]["message"]["content"] == "one two"
    assert body["usage"]["completion_tokens"] == len(tokens)


async def test_chat_logprobs(stack: Stack) -> None:
    tokens = tokens_of(stack, "Hi 😀")
    scores = [(-0.5, [token, 5], [-0.5, float("-inf")]) for token in [*tokens, EOS]]
    stack.says("Hi 😀", logprobs=scores)
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    whole = (await stack.chat(**fields)).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in whole] == [-0.5] * len(tokens)
    assert bytes(byte for entry in whole for byte in entry["bytes"]).decode() == "Hi 😀"
    assert whole[0]["token"] == "Hi"
    assert [top["logprob"] for top in whole[0]["top_logprobs"]] == [-0.5, -9999.0]
    assert stack.scheduler.submits[0].sampling.logprobs == 2
    streamed = [
        entry
        for chunk in chunks_of((await stack.chat(stream=True, **fields)).text)
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == whole


async def test_completion_logprobs(stack: Stack) -> None:
    tokens = tokens_of(stack, " one two")
    stack.says(" one two", logprobs=[(-1.0, [5], [-0.25])] * (len(tokens) + 1))
    logprobs = (await stack.complete(logprobs=1)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [" one", " two"]
    assert logprobs["token_logprobs"] == [-1.0, -1.0]
    assert logprobs["text_offset"] == [0, 4]
    decode = stack.service.gateway.tokenizer.pieces
    assert logprobs["top_logprobs"][0] == {decode[5].decode(): -0.25, " one": -1.0}


async def test_all_parameters_reach_the_scheduler(stack: Stack) -> None:
    stack.says("ok")
    response = await stack.http.post(
        "/v1/chat/completions",
        json={
            "model": MODEL,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "temperature": 0.5,
            "top_p": 0.25,
            "top_k": 7,
            "min_p": 0.125,
            "presence_penalty": 1.5,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.25,
            "logit_bias": {"5": -100, "6": 2.5},
            "seed": 11,
            "max_completion_tokens": 9,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [3],
            "priority": -4,
            "user": "somebody",
        },
        headers={"x-fastserve-class": "batch", "x-fastserve-tenant": "blue"},
    )
    assert response.status_code == 200
    (submit,) = stack.scheduler.submits
    assert submit.sampling == sampling_pb2.SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.25,
        logit_bias_ids=[5, 6],
        logit_bias_values=[-100, 2.5],
        seed=11,
        max_tokens=9,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[3],
    )
    assert (submit.tenant, submit.service_class, submit.priority) == ("blue", "batch", -4)


async def test_an_answer_without_text(stack: Stack) -> None:
    stack.scheduler.reply = Script(tokens=[EOS])
    (chunk,) = chunks_of((await stack.chat(stream=True)).text)
    assert chunk["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunk["choices"][0]["finish_reason"] == "stop"


async def test_tokenize_and_back(stack: Stack) -> None:
    body = (await stack.http.post("/tokenize", json={"model": MODEL, "prompt": TEXT})).json()
    assert body == {
        "count": len(tokens_of(stack, TEXT)),
        "max_model_len": 200,
        "tokens": tokens_of(stack, TEXT),
    }
    back = await stack.http.post("/detokenize", json={"tokens": body["tokens"]})
    assert back.json() == {"prompt": TEXT}
    messages = [{"role": "user", "content": "Hi"}]
    chat = (await stack.http.post("/tokenize", json={"messages": messages})).json()
    assert chat["tokens"] == stack.service.gateway.tokenizer.encode_chat(messages)
