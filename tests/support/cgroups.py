"""Limits of memory that the kernel enforces: cgroups, version 1 or 2."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


class MemoryLimit:
    """A cgroup. What its processes need beyond the limit gets one of them killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._events = "memory.oom_control" if folder.is_relative_to(_V1) else "memory.events"

    @property
    def inside(self) -> list[str]:
        """What to put before a command to run it in here."""
        enter = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", enter, str(self._folder / "cgroup.procs")]

    @property
    def kills(self) -> int:
        """Processes that the kernel killed for want of memory."""
        lines = (self._folder / self._events).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[0] == "oom_kill")


@contextlib.contextmanager
def memory_limit(limit: int) -> Iterator[MemoryLimit]:
    """Processes must have ended with the block. Skips the test where no cgroup can be made."""
    v1 = (_V1 / "memory.limit_in_bytes").exists()
    folder = (_V1 if v1 else _V2) / f"fastserve-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        try:
            if v1:
                (folder / "memory.limit_in_bytes").write_text(str(limit))
            else:
                with contextlib.suppress(OSError):  # it may be on already
                    (_V2 / "cgroup.subtree_control").write_text("+memory")
                (folder / "memory.max").write_text(str(limit))
                (folder / "memory.swap.max").write_text("0")
        except OSError as error:
            pytest.skip(f"memory cannot be limited by cgroups here: {error}")
        yield MemoryLimit(folder)
    finally:
        folder.rmdir()
