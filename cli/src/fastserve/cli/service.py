"""One child process: start, readiness, death, restart with a growing pause."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from fastserve.common.processes import ending

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 10.0
_STEADY_S = 30.0  # after so long, a death is a new matter
_PR_SET_PDEATHSIG = 1


class State(StrEnum):
    WAITING = "waiting"  # for those it needs
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Spec:
    """What to run.

    argv: the command, given what was ready before it (`needs` by name) and this service's own last
        ready values, so that it comes back under the same address.
    probe: what the service says of itself once it is ready, else None.
    once: a task that ends with status 0; then it is ready.
    """

    name: str
    argv: Callable[[dict[str, dict[str, Any]]], Sequence[str]]
    probe: Callable[[], dict[str, Any] | None]
    needs: tuple[str, ...] = ()
    once: bool = False
    forget: Callable[[], None] = lambda: None  # removes what an earlier life left to be probed


@dataclass
class Service:
    """A child and what is known of it. Driven by `Supervisor`; `now` is monotonic."""

    spec: Spec
    log: Path
    env: dict[str, str]
    state: State = State.WAITING
    ready: dict[str, Any] = field(default_factory=dict)  # what it said last
    restarts: int = 0
    was_ready: bool = False
    since: float = 0.0  # of the state
    seconds: float | None = None  # from start to ready
    ended: str | None = None  # how it died last
    process: subprocess.Popen[bytes] | None = None
    _pause: float = _FIRST_PAUSE_S
    _started: float = 0.0

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    def start(self, known: dict[str, dict[str, Any]], now: float) -> None:
        self.spec.forget()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                list(self.spec.argv(known)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self.spec.once else log,
                stderr=log,
                env=self.env,
                start_new_session=True,  # Ctrl-C is for us; we stop them in order
                preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509  # no threads here
            )
        self._started = now
        self._become(State.STARTING, now)

    def poll(self, now: float) -> None:
        """Notice readiness and death."""
        if self.process is None:
            if self.state is State.RESTARTING and now - self.since >= self._pause:
                self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
                self._become(State.WAITING, now)
            return
        code = self.process.poll()
        if self.spec.once:
            if code == 0:
                assert self.process.stdout is not None
                self.ready = {"output": self.process.stdout.read().decode().strip()}
                self.process.stdout.close()
                self.process = None
                self._is_ready(now)
            elif code is not None:
                self._died(code, now)
        elif code is not None:
            self._died(code, now)
        elif self.state is State.STARTING:
            told = self.spec.probe()
            if told is not None:
                self.ready = told
                self._is_ready(now)
        elif self.state is State.READY and now - self.since > _STEADY_S:
            self._pause = _FIRST_PAUSE_S

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def stopped(self) -> bool:
        """Whether nothing of it runs."""
        if self.process is not None and self.process.poll() is None:
            return False
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None
        if self.state is not State.FAILED:
            self.state = State.STOPPED
        return True

    def _is_ready(self, now: float) -> None:
        self.was_ready = True
        self.seconds = now - self._started
        self._become(State.READY, now)

    def _died(self, code: int, now: float) -> None:
        self.ended = ending(code)
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None
        if self.was_ready:
            self.restarts += 1
            self._become(State.RESTARTING, now)
        else:
            self._become(State.FAILED, now)

    def _become(self, state: State, now: float) -> None:
        self.state, self.since = state, now


def ready_file(path: Path) -> Callable[[], dict[str, Any] | None]:
    """A probe for services that write a ready file."""

    def probe() -> dict[str, Any] | None:
        try:
            told: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        return told

    return probe


def _die_with(parent: int) -> Callable[[], None] | None:
    """For Linux: the kernel ends the child when this process is killed, so nothing is orphaned."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return arrange
