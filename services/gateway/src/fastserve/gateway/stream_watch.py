"""Notices a stream that is silent, and a client that does not read, with one timer per stream.

A time-out around every wait would cost more than the token that is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class StreamWatch:
    """Watches the task that makes it, until `stop`. Times are in seconds.

    They are checked at least as often as the shorter of them passes, so a client that does not
    read is cut off at most that much later.
    """

    def __init__(
        self, ping_interval: float, send_timeout: float, on_silence: Callable[[], None]
    ) -> None:
        """`on_silence` is called whenever nothing was sent for `ping_interval`."""
        self._ping_interval = ping_interval
        self._send_timeout = send_timeout
        self._on_silence = on_silence
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._sending = False
        self._since = self._loop.time()  # this send began, or the last one ended
        self.stuck = False  # the client did not read: the task is being cancelled
        self._timer = self._loop.call_later(min(ping_interval, send_timeout), self._check)

    def send_begins(self) -> None:
        self._sending = True
        self._since = self._loop.time()

    def send_ends(self) -> None:
        self._sending = False
        self._since = self._loop.time()

    def stop(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        now = self._loop.time()
        left = self._since - now + (self._send_timeout if self._sending else self._ping_interval)
        if left <= 0:
            if self._sending:
                self.stuck = True
                if self._task is not None:
                    self._task.cancel()
                return
            self._on_silence()
            self._since = now
            left = self._ping_interval
        pause = min(left, self._ping_interval, self._send_timeout)
        self._timer = self._loop.call_later(pause, self._check)
