"""The engine thread: a bug in it must not go unnoticed."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from fastserve.worker.engine import Engine, Iteration
from fastserve.worker.engine_thread import EngineThread


class _Broken:
    """An engine with a bug that shows in its first iteration."""

    runnable = False

    def step(self) -> Iteration:
        raise RuntimeError("a bug")

    def idle_report(self) -> Iteration | None:
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
