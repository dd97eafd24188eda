"""Servers that a benchmark starts: in a process group of their own, stopped by pid."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")

_POLL_S: Final = 0.1
_STOP_S: Final = 20.0  # between SIGTERM and SIGKILL
_TAIL: Final = 15  # lines of a log in an error


class StartError(Exception):
    """A server that did not come up; the message holds the end of its log."""


class ServerProcess:
    """One running server."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    async def ready(self, check: Callable[[], Awaitable[bool] | bool], timeout_s: float) -> float:
        """Wait until `check()` is true; the seconds that took. Raises `StartError`."""
        started = time.monotonic()
        while True:
            found = check()
            if found if isinstance(found, bool) else await found:
                return time.monotonic() - started
            if self.process.poll() is not None:
                raise StartError(f"{self.name} ended with {self.process.returncode}{self._tail()}")
            if time.monotonic() - started > timeout_s:
                raise StartError(f"{self.name} is not ready after {timeout_s:g} s{self._tail()}")
            await asyncio.sleep(_POLL_S)

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_TAIL:]
        return f". Its log ({self.log}) ends with:\n" + "\n".join(f"  {line}" for line in lines)

    async def stop(self) -> None:
        """SIGTERM to it, then SIGKILL to its process group, which holds what it started."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self.process.wait, _STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.asynccontextmanager
async def server(
    name: str, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> AsyncIterator[ServerProcess]:
    """Run a command until the block ends, its output in `log`. Raises `StartError`."""
    running = ServerProcess(name, _start(name, argv, log, env), log)
    try:
        yield running
    finally:
        await running.stop()


def _start(
    name: str, argv: Sequence[str], log: Path, env: Mapping[str, str] | None
) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        try:
            return subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        except OSError as error:
            raise StartError(f"{name} cannot be started: {argv[0]}: {error.strerror}") from None


async def end_on_sigterm(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which SIGTERM cancels: no server is left behind."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def model_folder(model: str | None) -> Path:
    """The folder that FastServe serves a model from; converted if need be. Raises `StartError`."""
    argv = [sys.executable, "-m", "fastserve.worker.model.prepare", *([model] if model else [])]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StartError(done.stderr.strip() or f"{argv[2]} failed")
    return Path(done.stdout.splitlines()[-1])
