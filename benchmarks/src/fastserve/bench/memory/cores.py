"""Cores for deployments that run at once, so that each gets as much of the machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Final

import psutil

from fastserve.bench.arrivals import LoadError

# The cores of a virtual machine are not equally fast, by up to a tenth and for minutes. Past
# capacity that doubles a latency; whoever has every core in turn has the mean of them.
_TURN_S: Final = 1.0


def shares(count: int) -> list[Collection[int]]:
    """As many cores for each of so many deployments. Raises `LoadError` if there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // count
    if not each:
        raise LoadError(
            f"--at-once: {count} deployments need as many cores, not {len(cores)}: give --only"
        )
    return [cores[at * each :][:each] for at in range(count)]


@contextlib.asynccontextmanager
async def in_turns(pids: Sequence[int], cores: Sequence[Collection[int]]) -> AsyncIterator[None]:
    """Until the block ends, processes and what they started change cores with each other, each
    second once around. Afterwards everybody is where it was."""
    over = asyncio.Event()
    turning = asyncio.create_task(_turn(pids, cores, over))
    try:
        yield
    finally:
        over.set()
        await turning


async def _turn(pids: Sequence[int], cores: Sequence[Collection[int]], over: asyncio.Event) -> None:
    turn = 0
    while not over.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), _TURN_S)
            break
        turn = (turn + 1) % len(cores)
        await asyncio.to_thread(_place, pids, [*cores[turn:], *cores[:turn]])
    await asyncio.to_thread(_place, pids, cores)


def _place(pids: Sequence[int], cores: Sequence[Collection[int]]) -> None:
    for pid, own in zip(pids, cores, strict=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                _bind(process, own)


def _bind(process: psutil.Process, cores: Collection[int]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for thread in process.threads():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, cores)
