"""What one `fastserve up` leaves on disk while it runs: a lock, a state file, logs.

The lock is held by the running process and falls with it, however it ends; the state file says
where things are. Nothing else is trusted.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import psutil

from fastserve.cli.errors import CliError
from fastserve.common.files import write_json


def default_folder() -> Path:
    """$FASTSERVE_STATE_DIR, or fastserve in the user's state folder."""
    if given := os.environ.get("FASTSERVE_STATE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fastserve"


class StateFolder:
    """The folder of one deployment on this machine."""

    def __init__(self, folder: Path) -> None:
        """Raises `CliError` if it cannot be made."""
        self.folder = folder
        self.logs = folder / "logs"
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CliError(f"cannot use the state folder {folder}: {error}") from error
        self._file = folder / "state.json"
        self._lock_fd: int | None = None

    def lock(self) -> None:
        """Become the one `up` of this folder. Raises `CliError` if that cannot be."""
        try:
            fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CliError(f"cannot use the state folder {self.folder}: {error}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            state = self.read()
            where = f" at {state['url']}" if state else ""
            raise CliError(
                f"FastServe is up already{where}. Stop it with `fastserve down`, or start another "
                "one with --state-dir and --port"
            ) from None
        self._lock_fd = fd

    def unlock(self) -> None:
        """Give it up: what is on disk is no longer true."""
        self._file.unlink(missing_ok=True)
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def write(self, state: dict[str, Any]) -> None:
        process = psutil.Process()
        write_json(self._file, {"pid": process.pid, "started": process.create_time(), **state})

    def read(self) -> dict[str, Any] | None:
        """State of the running `up`; None if none runs."""
        try:
            state: dict[str, Any] = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return None
        return state if process_of(state) is not None else None

    def log(self, service: str) -> Path:
        return self.logs / f"{service}.log"


def process_of(state: dict[str, Any]) -> psutil.Process | None:
    """The process that wrote a state; None if it is gone (its pid may be another's by now)."""
    try:
        process = psutil.Process(state["pid"])
        same = abs(process.create_time() - state["started"]) < 1.0
    except (psutil.Error, KeyError, TypeError):  # gone, or no state of ours
        return None
    return process if same and process.status() != psutil.STATUS_ZOMBIE else None


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log; none if there is no log."""
    try:
        return path.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return []
