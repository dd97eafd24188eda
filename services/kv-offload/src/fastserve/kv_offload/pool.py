"""The pool file: shared memory that sidecar and worker both map.

The sidecar only creates, sizes and removes the file; the bytes are the worker's business.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from pathlib import Path

from fastserve.common.errors import StartupError

_PREFIX = "fastserve-kv-"
_PAGE = 4096


def slot_bytes(block_bytes: int) -> int:
    """`block_bytes` rounded up to a page, so that slots can be copied and spilled page-wise."""
    return -(-block_bytes // _PAGE) * _PAGE


class Pool:
    """A file of `size` bytes in `folder`, reserved in full and removed by `close()`.

    A lock on the file tells a live pool from one that a killed process left behind.
    """

    def __init__(self, folder: Path, size: int) -> None:
        """Raises `StartupError` if the file system has no room."""
        remove_stale(folder)
        self.size = size
        self.path = folder / f"{_PREFIX}{uuid.uuid4().hex[:12]}"
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Reserving now turns "no space" into this error instead of a SIGBUS in the worker.
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            self.close()
            raise StartupError(
                f"cannot reserve {size / 2**20:.0f} MiB for KV blocks in {folder}: "
                f"{error.strerror}. Lower --host-memory or choose another --pool-dir"
            ) from error

    def close(self) -> None:
        """Remove the file; a worker that has it mapped keeps its memory until it unmaps."""
        self.path.unlink(missing_ok=True)
        os.close(self._fd)


def remove_stale(folder: Path) -> None:
    """Remove pool files whose process is gone (they hold memory until then)."""
    for path in folder.glob(f"{_PREFIX}*"):
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
