"""Runs against a server whose answers are scripted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from fastserve.bench.load.http import Address, HttpClient
from fastserve.bench.load.report import Slo, latencies, report
from fastserve.bench.load.run import Runner
from fastserve.bench.load.target import CHAT, Asking, Target
from fastserve.bench.load.types import LoadRequest, RunResult
from support.api_server import Answer, ApiServer, as_asked, running_api_server
from support.waiting import eventually


def requests(*due_s: float, tokens: int = 3) -> list[LoadRequest]:
    return [LoadRequest(due, f"request {at}", 3, tokens) for at, due in enumerate(due_s)]


async def target_of(api: ApiServer, **asking: Any) -> Target:
    return await Target.find(HttpClient(Address(api.url), {}), None, Asking(**asking))


async def open_loop(api: ApiServer, load: Sequence[LoadRequest], **asking: Any) -> RunResult:
    target = await target_of(api, **asking)
    try:
        async with asyncio.timeout(30):
            return await Runner(target, asyncio.Event()).open_loop(load)
    finally:
        target.http.close()


def errors(result: RunResult) -> list[str | None]:
    outcomes = sorted(result.outcomes, key=lambda outcome: outcome.request.prompt)
    return [outcome.error for outcome in outcomes]


async def test_a_stalled_server_shows_in_all_that_was_due_meanwhile() -> None:
    """No coordinated omission: requests leave while the server stands, and their wait counts."""
    gate = asyncio.Event()
    due = [0.0, 0.05, 0.1, 0.15]
    async with running_api_server(lambda body: Answer(tokens=1, gate=gate)) as api:
        running = asyncio.ensure_future(open_loop(api, requests(*due, tokens=1)))
        await eventually(lambda: len(api.bodies) == len(due))  # all left, none was answered
        await asyncio.sleep(0.5)  # the stall itself
        gate.set()
        result = await running
    assert errors(result) == [None] * 4
    outcomes = sorted(result.outcomes, key=lambda outcome: outcome.due)
    assert [outcome.due for outcome in outcomes] == due
    assert all(ttft > 0.5 for ttft in latencies(outcomes)["ttft_s"])
    # They waited for the same moment, each from its own.
    moments = [outcome.first for outcome in outcomes]
    assert max(moments) - min(moments) < 0.5


async def test_latency_counts_from_when_it_was_due_even_if_the_client_was_late() -> None:
    async with running_api_server() as api:
        target = await target_of(api)
        runner = Runner(target, asyncio.Event())
        running = asyncio.ensure_future(runner.open_loop(requests(0.0, 0.5)))
        await eventually(lambda: len(api.bodies) == 1)
        time.sleep(1.0)  # the event loop stands, and with it the client
        result = await running
        target.http.close()
    late = max(result.outcomes, key=lambda outcome: outcome.due)
    assert late.due == 0.5 and late.sent - late.due > 0.2
    assert late.first - late.due > 0.2
    assert result.client.late_max_s > 0.2 and result.client.stall_p99_s > 0.2


async def test_requests_do_not_leave_before_they_are_due() -> None:
    async with running_api_server() as api:
        result = await open_loop(api, requests(0.0, 0.02, 0.04, 0.3))
    assert all(outcome.sent >= outcome.due for outcome in result.outcomes)


async def test_every_way_to_fail_is_a_failure() -> None:
    answers = [
        Answer(status=429, text="the queue is full"),
        Answer(tokens=4, error_at=2, text="it broke"),
        Answer(tokens=4, cut_at=2),
        Answer(tokens=4, finish=False),
        Answer(tokens=3),
    ]

    def script(body: dict[str, Any]) -> Answer:
        return answers[int(body["prompt"].split()[1])]

    async with running_api_server(script) as api:
        result = await open_loop(api, requests(0.0, 0.0, 0.0, 0.0, 0.0))
    assert errors(result) == [
        "HTTP 429: the queue is full",
        "in the stream: it broke",
        "the connection was lost before the answer was complete",
        "the stream ended without an end",
        None,
    ]
    found = report(result, Slo(10.0), ignore_eos=False, cut_to_length=0)
    assert found["failed"] == 4 and found["slo_attainment"] == 0.2


async def test_a_server_that_is_gone_and_one_that_never_ends() -> None:
    async with running_api_server() as api:
        target = await target_of(api)
    target.http.close()
    target.http.address.port = 9  # discard: nobody listens there
    result = await Runner(target, asyncio.Event()).open_loop(requests(0.0))
    assert "no connection" in (errors(result)[0] or "")
    async with running_api_server(lambda body: Answer(gate=asyncio.Event())) as api:
        result = await open_loop(api, requests(0.0), timeout_s=0.2)
    assert errors(result) == ["no complete answer after 0.2 s"]


async def test_tokens_and_times_of_an_answer() -> None:
    async with running_api_server(lambda body: Answer(tokens=3, pause_s=0.3)) as api:
        result = await open_loop(api, requests(0.0), endpoint=CHAT, ignore_eos=True)
    (outcome,) = result.outcomes
    assert (outcome.prompt_tokens, outcome.completion_tokens, outcome.events) == (3, 3, 3)
    assert outcome.first - outcome.due > 0.3
    assert len(outcome.gaps) == 2 and min(outcome.gaps) > 0.05
    assert outcome.last <= outcome.end
    (body,) = api.bodies
    assert body["messages"] == [{"role": "user", "content": "request 0"}]
    assert body["ignore_eos"] is True and body["stream_options"] == {"include_usage": True}


async def test_a_closed_loop_has_so_many_requests_at_a_time() -> None:
    under_way = most = 0

    def script(body: dict[str, Any]) -> Answer:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        return as_asked(body)

    def ended(_: int) -> None:
        nonlocal under_way
        under_way -= 1

    async with running_api_server(script) as api:
        target = await target_of(api)
        runner = Runner(target, asyncio.Event(), ended)
        result = await runner.closed_loop(requests(*[0.0] * 20), 4)
        target.http.close()
        assert api.connections <= 4 + 1
    assert most == 4 and len(result.outcomes) == 20
    assert result.client.late_max_s < 0.2


async def test_stopping_reports_what_has_ended() -> None:
    gate, stop = asyncio.Event(), asyncio.Event()

    def script(body: dict[str, Any]) -> Answer:
        return Answer(tokens=1, gate=gate if body["prompt"] == "request 1" else None)

    async with running_api_server(script) as api:
        target = await target_of(api)
        ended: list[int] = []
        runner = Runner(target, stop, ended.append)
        running = asyncio.ensure_future(runner.open_loop(requests(0.0, 0.0, 1000.0, tokens=1)))
        await eventually(lambda: ended == [1] and len(api.bodies) == 2)
        stop.set()
        result = await asyncio.wait_for(running, 10)
        target.http.close()
    assert [outcome.request.prompt for outcome in result.outcomes] == ["request 0"]
    assert (result.unfinished, result.not_sent) == (1, 1)


async def test_connections_are_reused() -> None:
    async with running_api_server() as api:
        target = await target_of(api)
        result = await Runner(target, asyncio.Event()).closed_loop(requests(0.0, 0.0, 0.0), 1)
        target.http.close()
        assert errors(result) == [None] * 3 and api.connections == 1


async def test_a_connection_that_the_server_closed_while_it_was_idle_is_no_failure() -> None:
    async with running_api_server(drop_reused=True) as api:
        target = await target_of(api)
        result = await Runner(target, asyncio.Event()).closed_loop(requests(0.0, 0.0, 0.0), 1)
        target.http.close()
        assert errors(result) == [None] * 3 and api.connections == 3
