"""Waiting for something to become true, with an end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable


async def eventually(
    check: Callable[[], object], what: str = "the condition", timeout: float = 30.0
) -> None:
    """Return once `check()` is true. Raises AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < deadline, f"{what} did not come within {timeout} s"
        await asyncio.sleep(0.005)


async def eventually_async(
    check: Callable[[], Awaitable[object]], what: str, timeout: float = 30.0
) -> None:
    """The same for a question that takes a call to another process."""
    deadline = time.monotonic() + timeout
    while not await check():
        assert time.monotonic() < deadline, f"{what} did not come within {timeout} s"
        await asyncio.sleep(0.01)
