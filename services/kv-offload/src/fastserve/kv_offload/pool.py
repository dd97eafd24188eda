"""The pool file: shared memory that sidecar and worker both map."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import structlog

from fastserve.common.errors import StartupError
from fastserve.kv_offload.scratch import ScratchFile

log = structlog.get_logger(__name__)
PREFIX = "fastserve-kv-"
_PAGE = 4096
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it


def slot_bytes(block_bytes: int) -> int:
    """`block_bytes` rounded up to a page, so that slots can be copied and spilled page-wise."""
    return -(-block_bytes // _PAGE) * _PAGE


class Pool:
    """A file of at least `size` bytes in `folder`, reserved in full and removed by `close()`."""

    def __init__(self, folder: Path, size: int) -> None:
        """Raises `StartupError` if the file system has no room."""
        # On hugetlbfs only whole huge pages can be had; its block size is theirs.
        unit = os.statvfs(folder).f_bsize
        self.size = -(-size // unit) * unit
        self._file = ScratchFile(folder, PREFIX)
        self.path = self._file.path
        try:
            os.ftruncate(self._file.fd, self.size)
            self._map: mmap.mmap | None = mmap.mmap(self._file.fd, self.size)
            self.huge_pages = _populate_huge(self._map)
            # Reserving now turns "no space" into this error instead of a SIGBUS in the worker.
            os.posix_fallocate(self._file.fd, 0, self.size)
        except (OSError, OverflowError) as error:
            self.close()
            reason = error.strerror if isinstance(error, OSError) else "it is too large"
            raise StartupError(
                f"cannot reserve {size / 2**20:.0f} MiB for KV blocks in {folder}: "
                f"{reason}. Lower --host-memory or choose another --pool-dir"
            ) from error

    def view(self, start: int, size: int) -> memoryview:
        """Bytes `start` .. `start + size` of the file."""
        if self._map is None:
            raise ValueError("the pool is closed")
        return memoryview(self._map)[start : start + size]

    def close(self) -> None:
        """Remove the file; a worker that has it mapped keeps its memory until it unmaps."""
        self._map = None  # unmapped with the last view
        self._file.close()


def _populate_huge(pool: mmap.mmap) -> bool:
    """Allocate the pages now, as huge ones if the kernel has them for shared memory; whether it
    agreed. Where it does not, ordinary pages are allocated by the caller."""
    try:
        pool.madvise(mmap.MADV_HUGEPAGE)
        pool.madvise(_MADV_POPULATE_WRITE)
    except OSError as error:
        log.info("no huge pages for the pool", reason=error.strerror)
        return False
    return True
