"""The engine thread: a bug in it must not go unnoticed."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import pytest

from fastserve.worker.engine import Engine, Iteration
from fastserve.worker.engine_thread import EngineThread
from fastserve.worker.job import OpResult, OpStatus
from fastserve.worker.model.sampling import Sampled
from support.waiting import eventually


class _Broken:
    """An engine with a bug that shows in its first iteration."""

    runnable = has_rows = False

    def step(self, computing: AbstractContextManager[None]) -> Iteration:
        raise RuntimeError("a bug")

    def ended_report(self) -> Iteration | None:
        return None


async def test_a_bug_ends_the_thread_and_is_told() -> None:
    thread = EngineThread(asyncio.get_running_loop())
    engine = _Broken()
    thread.start(cast(Engine, engine), lambda _: None)

    def run(_: Engine) -> None:
        engine.runnable = True

    thread.post(run)
    with pytest.raises(RuntimeError, match="a bug"):
        await asyncio.wait_for(thread.failure, timeout=10)
    await thread.stop()


async def test_questions_are_answered_between_iterations() -> None:
    thread = EngineThread(asyncio.get_running_loop())
    thread.start(cast(Engine, _Broken()), lambda _: None)
    async with asyncio.timeout(10):
        assert await thread.ask(lambda engine: engine.runnable) is False
    await thread.stop()
    assert not thread.failure.done()


class _Leased:
    """An engine whose plan is good for one iteration."""

    runnable = has_rows = False

    def plan(self, *, rows: bool = True) -> None:
        self.runnable = self.has_rows = rows

    def step(self, computing: AbstractContextManager[None]) -> Iteration:
        self.runnable = False
        return Iteration(1, 1)

    def ended_report(self) -> Iteration | None:
        return None


class _Ending(_Leased):
    """A KV operation has ended when its iteration begins."""

    ended = True

    def ended_report(self) -> Iteration | None:
        report, self.ended = (Iteration(1) if self.ended else None), False
        return report


async def test_what_ended_is_told_before_the_next_iteration_runs() -> None:
    thread = EngineThread(asyncio.get_running_loop())
    engine, seen = _Ending(), list[Iteration]()
    thread.start(cast(Engine, engine), seen.append)
    thread.post(lambda _: engine.plan())
    await eventually(lambda: len(seen) == 2)
    await thread.stop()
    assert [report.iteration for report in seen] == [0, 1]


class _Long(_Leased):
    """Its iteration lasts until it may end."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def step(self, computing: AbstractContextManager[None]) -> Iteration:
        with computing:
            self.begun.set()
            self.may_end.wait(10)
        return super().step(computing)


class _Copying(_Long):
    """Operations end when they are told to."""

    def __init__(self) -> None:
        super().__init__()
        self.order, self.ops = list[str](), list[OpResult]()

    def copied(self, number: int) -> None:
        self.order.append(f"copied {number}")
        self.ops.append(OpResult(number, OpStatus.OK, 16, 4096, 0.5))

    def ended_report(self) -> Iteration | None:
        ops, self.ops = self.ops, []
        return Iteration(1, ops=ops) if ops else None


async def test_while_the_model_computes_a_copy_ends_at_once_and_is_told() -> None:
    thread = EngineThread(asyncio.get_running_loop())
    engine, told = _Copying(), list[int]()
    thread.start(cast(Engine, engine), lambda report: told.extend(op.op_id for op in report.ops))
    thread.post(lambda _: engine.plan())
    await eventually(engine.begun.is_set)
    thread.post(lambda _: engine.order.append("planned"))
    thread.soon(lambda _: engine.copied(7))  # however much waits for the boundary
    assert engine.order == ["copied 7"] and told == [7]
    engine.may_end.set()
    await eventually(lambda: engine.order == ["copied 7", "planned"])
    thread.soon(lambda _: engine.copied(8))  # nothing runs: the thread has to be woken
    await eventually(lambda: told == [7, 8])
    assert thread.at_once(lambda _: True) is None
    await thread.stop()
    assert thread.at_once(lambda _: True) is None


async def test_what_is_asked_while_the_model_computes_is_answered_at_once() -> None:
    thread = EngineThread(asyncio.get_running_loop())
    engine = _Long()
    assert thread.at_once(lambda _: 5) is None  # it has not started
    thread.start(cast(Engine, engine), lambda _: None)
    thread.post(lambda _: engine.plan())
    await eventually(engine.begun.is_set)
    assert thread.at_once(lambda _: 5) == 5
    engine.may_end.set()
    await thread.stop()


async def test_a_bug_beside_an_iteration_is_told_too() -> None:
    thread = EngineThread(asyncio.get_running_loop())
    engine = _Long()
    thread.start(cast(Engine, engine), lambda _: None)
    thread.post(lambda _: engine.plan())
    await eventually(engine.begun.is_set)

    def bug(_: Engine) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        thread.soon(bug)
    with pytest.raises(RuntimeError, match="a bug"):
        await asyncio.wait_for(thread.failure, timeout=10)
    engine.may_end.set()  # the lock is free again
    await thread.stop()


async def test_waiting_for_a_plan_counts_while_there_are_rows() -> None:
    thread = EngineThread(asyncio.get_running_loop())
    engine, seen = _Leased(), list[Iteration]()
    thread.start(cast(Engine, engine), seen.append)
    thread.post(lambda _: engine.plan())
    await eventually(lambda: len(seen) == 1)
    waited = time.perf_counter()
    await asyncio.sleep(0.05)  # the plan is late
    waited = time.perf_counter() - waited
    thread.post(lambda _: engine.plan())
    await eventually(lambda: len(seen) == 2)
    # A plan without rows, or a scheduler that is gone: there is nothing to wait for.
    await thread.ask(lambda _: engine.plan(rows=False))
    thread.post(lambda _: engine.plan())
    await eventually(lambda: len(seen) == 3)
    await thread.stop()
    assert seen[0].control_seconds is None
    assert seen[1].control_seconds is not None and seen[1].control_seconds >= waited
    assert seen[2].control_seconds is None


class _Ringing(_Leased):
    """Its plans are good for `lease` iterations; the last of them lasts until it may end, and rings
    only if it is told to."""

    bell: int | None = None

    def __init__(self, lease: int, first: Iteration | None = None) -> None:
        self.lease, self.count = lease, 0
        self.ops = list[OpResult]()
        self.first = first  # what its first iteration did
        self.on_first: Callable[[], None] = lambda: None
        self.held, self.may_ring, self.may_end = (threading.Event() for _ in range(3))

    def step(self, computing: AbstractContextManager[None]) -> Iteration:
        self.count += 1
        self.runnable = self.count < self.lease
        if not self.runnable:
            with computing:
                self.held.set()
                self.may_ring.wait(10)
                if self.bell is not None:
                    os.eventfd_write(self.bell, 1)
                self.may_end.wait(10)
        if self.count == 1 and self.first is not None:
            self.on_first()
            return self.first
        return Iteration(1, self.count)

    def ended_report(self) -> Iteration | None:
        ops, self.ops = self.ops, []
        return Iteration(1, ops=ops) if ops else None


def _ringing(
    lease: int, seen: list[Any], first: Iteration | None = None
) -> tuple[EngineThread, _Ringing]:
    """A thread whose engine has a bell; `seen` gets numbers of iterations and ids of copies."""
    thread, engine = EngineThread(asyncio.get_running_loop()), _Ringing(lease, first)
    engine.bell = thread.bell()

    def told(report: Iteration) -> None:
        seen.extend(f"op {op.op_id}" for op in report.ops)
        if report.iteration:
            seen.append(report.iteration)

    thread.start(cast(Engine, engine), told)
    thread.post(lambda _: engine.plan())
    return thread, engine


async def test_an_iteration_is_told_while_the_next_one_computes_and_the_last_one_at_once() -> None:
    seen = list[Any]()
    thread, engine = _ringing(2, seen)
    await eventually(engine.held.is_set)
    assert seen == []  # nobody rang
    engine.may_ring.set()
    await eventually(lambda: seen == [1])
    engine.may_end.set()
    await eventually(lambda: seen == [1, 2])
    await thread.stop()
    assert seen == [1, 2]


async def test_without_a_bell_an_iteration_is_told_before_the_next_one() -> None:
    seen = list[Any]()
    thread, engine = EngineThread(asyncio.get_running_loop()), _Ringing(2)
    thread.start(cast(Engine, engine), lambda report: seen.append(report.iteration))
    thread.post(lambda _: engine.plan())
    await eventually(lambda: seen == [1])
    engine.may_ring.set()
    engine.may_end.set()
    await eventually(lambda: seen == [1, 2])
    await thread.stop()


FIRST = Iteration(1, 1, rows=[(7, 44, 44)], sampled=[(7, 0, Sampled(5), "")])
SECOND = Iteration(1, 1, rows=[(7, 1, 45)], sampled=[(7, 1, Sampled(5), "")])
CHUNK = Iteration(1, 1, rows=[(7, 44, 44)])
BESIDE = Iteration(1, 1, rows=[(7, 44, 44), (8, 1, 60)], sampled=[(7, 0, Sampled(5), "")])


@pytest.mark.parametrize(
    ("iteration", "at_once"), [(FIRST, True), (SECOND, False), (CHUNK, False), (BESIDE, False)]
)
async def test_the_first_token_of_a_job_alone_is_told_before_the_next_iteration(
    iteration: Iteration, at_once: bool
) -> None:
    seen = list[Any]()
    thread, engine = _ringing(2, seen, iteration)
    await eventually(engine.held.is_set)  # and nobody rang
    await asyncio.sleep(0)  # for what has woken the loop
    assert seen == ([1] if at_once else [])
    engine.may_ring.set()
    engine.may_end.set()
    await thread.stop()
    assert seen == [1, 2]


async def test_a_plan_that_waits_is_not_held_up_by_a_first_token() -> None:
    seen = list[Any]()
    thread, engine = _ringing(2, seen, FIRST)
    engine.on_first = lambda: thread.post(lambda _: seen.append("planned"))
    await eventually(engine.held.is_set)
    await asyncio.sleep(0)
    assert seen == ["planned"]  # nothing was told: the bell of the next iteration will do
    engine.may_ring.set()
    engine.may_end.set()
    await thread.stop()
    assert seen == ["planned", 1, 2]


async def test_reports_come_before_the_answer_to_a_later_question() -> None:
    seen = list[Any]()
    thread, engine = _ringing(2, seen)
    await eventually(engine.held.is_set)
    question = asyncio.ensure_future(thread.ask(lambda engine: engine.runnable))
    question.add_done_callback(lambda _: seen.append("answer"))
    await asyncio.sleep(0)  # it is in the inbox now
    engine.may_end.set()
    engine.may_ring.set()
    await question
    await eventually(lambda: seen[-1] == "answer")
    await thread.stop()
    assert seen == [1, 2, "answer"]


async def test_a_copy_that_ends_is_told_after_the_iteration_before() -> None:
    seen = list[Any]()
    thread, engine = _ringing(2, seen)
    await eventually(engine.held.is_set)
    thread.soon(lambda _: engine.ops.append(OpResult(7, OpStatus.OK, 16, 4096, 0.5)))
    assert seen == [1, "op 7"]
    engine.may_ring.set()
    engine.may_end.set()
    await thread.stop()
    assert seen == [1, "op 7", 2]


async def test_what_was_not_told_yet_is_told_when_the_thread_stops_and_the_bell_is_closed() -> None:
    seen = list[Any]()
    thread, engine = _ringing(1, seen)
    await eventually(engine.held.is_set)
    engine.bell, bell = None, engine.bell
    stopping = asyncio.ensure_future(thread.stop())
    await asyncio.sleep(0)  # the end is in the inbox now
    engine.may_ring.set()
    engine.may_end.set()
    await stopping
    assert seen == [1]
    assert bell is not None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(bell)


async def test_a_bug_is_told_after_the_iterations_before_it() -> None:
    seen = list[Any]()
    thread = EngineThread(asyncio.get_running_loop())
    thread.bell()

    class Breaks(_Leased):
        count = 0

        def step(self, computing: AbstractContextManager[None]) -> Iteration:
            self.count += 1
            if self.count == 2:
                raise RuntimeError("a bug")
            return Iteration(1, self.count)

    engine = Breaks()
    thread.failure.add_done_callback(lambda _: seen.append("bug"))
    thread.start(cast(Engine, engine), lambda report: seen.append(report.iteration))
    thread.post(lambda _: engine.plan())
    with pytest.raises(RuntimeError, match="a bug"):
        await asyncio.wait_for(thread.failure, timeout=10)
    await thread.stop()
    assert seen == [1, "bug"]
