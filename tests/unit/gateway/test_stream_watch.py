"""Silence and clients that do not read are noticed, and nothing else is."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from fastserve.gateway.stream_watch import StreamWatch
from support.waiting import eventually


async def test_silence_is_told_again_and_again() -> None:
    told: list[None] = []
    watch = StreamWatch(0.01, 5.0, lambda: told.append(None))
    try:
        await eventually(lambda: len(told) >= 3)
    finally:
        watch.stop()


async def test_a_stream_that_sends_is_not_silent() -> None:
    told: list[None] = []
    watch = StreamWatch(5.0, 0.01, lambda: told.append(None))
    for _ in range(5):
        await asyncio.sleep(0.02)  # several checks between two sends
        watch.send_begins()
        watch.send_ends()
    watch.stop()
    assert not told and not watch.stuck


async def test_a_send_that_does_not_end_cancels_the_task() -> None:
    watches: list[StreamWatch] = []

    async def stream() -> None:
        watch = StreamWatch(5.0, 0.05, lambda: None)
        watches.append(watch)
        watch.send_begins()
        await asyncio.Event().wait()

    task = asyncio.ensure_future(stream())
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)
    assert watches[0].stuck


async def test_nothing_happens_once_it_is_stopped() -> None:
    told: list[None] = []

    async def stream() -> None:
        watch = StreamWatch(0.01, 0.01, lambda: told.append(None))
        watch.send_begins()
        watch.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await asyncio.Event().wait()

    await stream()
    assert not told
