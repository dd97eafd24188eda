"""Files that live as long as the process that made them.

A lock on the file tells one in use from one that a killed process left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from pathlib import Path


class ScratchFile:
    """A new file in `folder`, locked, readable by its owner only, removed by `close()`."""

    def __init__(self, folder: Path, prefix: str) -> None:
        remove_stale(folder, prefix)
        self.path = folder / f"{prefix}{uuid.uuid4().hex[:12]}"
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Remove the file; whoever has it mapped or open keeps the bytes until then."""
        self.path.unlink(missing_ok=True)
        os.close(self.fd)


def remove_stale(folder: Path, prefix: str) -> None:
    """Remove files whose process is gone (they hold memory or disk space until then)."""
    for path in folder.glob(f"{prefix}*"):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            fd = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            else:
                path.unlink(missing_ok=True)
            finally:
                os.close(fd)
