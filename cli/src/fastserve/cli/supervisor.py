"""Starts services in order, keeps them running, stops them in reverse order."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastserve.cli.service import Service, State

_POLL_S = 0.03
_STOP_S = 15.0  # then a service is killed
_KILL_S = 5.0


class Supervisor:
    """Services by name, in the order of their start. `changed` is called whenever one moved on."""

    def __init__(
        self,
        services: Sequence[Service],
        changed: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        stop_s: float = _STOP_S,
    ) -> None:
        """clock: seconds, for starts and restarts; stop_s: how long a service may take to end."""
        self.services = {service.spec.name: service for service in services}
        self._changed = changed
        self._clock = clock
        self._stop_s = stop_s

    @property
    def all_ready(self) -> bool:
        return all(service.state is State.READY for service in self.services.values())

    @property
    def failed(self) -> Service | None:
        """A service that died before it was ever ready."""
        for service in self.services.values():
            if service.state is State.FAILED:
                return service
        return None

    def step(self) -> None:
        """Look at every service once, and start those that can be started."""
        now = self._clock()
        before = self._states()
        for service in self.services.values():
            service.poll(now)
        for service in self.services.values():
            if service.state is State.WAITING and self._can_start(service):
                service.start(self._known(), now)
        if self._states() != before:
            self._changed()

    def _states(self) -> list[tuple[State, int | None]]:
        return [(service.state, service.pid) for service in self.services.values()]

    def _can_start(self, service: Service) -> bool:
        """What it needs was ready once: they find each other again after a restart."""
        return all(self.services[name].was_ready for name in service.spec.needs)

    def _known(self) -> dict[str, dict[str, Any]]:
        return {name: service.ready for name, service in self.services.items()}

    def run_until(self, done: Callable[[], bool]) -> None:
        """Step until `done` says so."""
        while not done():
            self.step()
            time.sleep(_POLL_S)

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """End all, last started first; whoever does not end in time is killed.

        hurry: whether the user has lost patience.
        """
        for service in reversed(self.services.values()):
            service.signal(signal.SIGTERM)
            if not _within(self._stop_s, lambda s=service: s.stopped() or hurry()) or hurry():  # type: ignore[misc]
                service.signal(signal.SIGKILL)
                _within(_KILL_S, service.stopped)
            with contextlib.suppress(OSError):  # no full disk or closed terminal spares the rest
                self._changed()


def _within(seconds: float, done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
