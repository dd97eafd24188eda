"""The disk tier: one file, cut into slots, read and written by threads.

The file is scratch: what is in which slot is known to the process alone, so after a crash nothing
in it is believed, and the next start removes it. Slots are whole pages in page-aligned memory, as
O_DIRECT wants it: the bytes go past the page cache, which would only hold a second copy of them.
"""

from __future__ import annotations

import errno
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog
import xxhash

from fastserve.common.errors import StartupError
from fastserve.kv_offload.scratch import ScratchFile

log = structlog.get_logger(__name__)
PREFIX = "fastserve-kvdisk-"
THREADS = 4  # enough to keep an NVMe drive busy with blocks of a megabyte
_PROBE = 4096


class Corrupt(Exception):
    """The bytes read back are not those that were written."""


class DiskFile:
    """A file of `size` bytes in `folder`, reserved in full and removed by `close()`."""

    def __init__(self, folder: Path, size: int) -> None:
        """Raises `StartupError` if the file system has no room."""
        self.size = size
        self._file = ScratchFile(folder, PREFIX)
        self.path = self._file.path
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kv-disk")
        try:
            os.posix_fallocate(self._file.fd, 0, size)
        except (OSError, OverflowError) as error:
            self._file.close()
            reason = error.strerror if isinstance(error, OSError) else "it is too large"
            raise StartupError(
                f"cannot reserve {size / 2**20:.0f} MiB for KV blocks in {folder}: "
                f"{reason}. Lower --disk-size or choose another --disk-path"
            ) from error
        direct = _open_direct(self.path)
        self.direct = direct is not None
        self.fd = self._file.fd if direct is None else direct

    def close(self) -> None:
        """Wait for reads and writes under way, then remove the file."""
        self.threads.shutdown(wait=True)
        if self.direct:
            os.close(self.fd)
        self._file.close()


class DiskRegion:
    """A part of the file, as slots of `slot_bytes`. Methods are called in threads."""

    def __init__(self, file: DiskFile, start: int, size: int, slot_bytes: int) -> None:
        self._fd, self.threads = file.fd, file.threads
        self._start = -(-start // _PROBE) * _PROBE
        self._slot_bytes = slot_bytes
        self.slots = (start + size - self._start) // slot_bytes

    def write(self, slot: int, data: memoryview) -> None:
        """Write a whole slot. Raises OSError."""
        written = os.pwrite(self._fd, data, self._start + slot * self._slot_bytes)
        if written != len(data):
            raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes were written")

    def read(self, slot: int, into: memoryview, block_bytes: int, checksum: int) -> None:
        """Read a whole slot. Raises OSError, or `Corrupt` if its block has another xxh3_64."""
        count = os.preadv(self._fd, [into], self._start + slot * self._slot_bytes)
        if count != len(into):
            raise OSError(errno.EIO, f"only {count} of {len(into)} bytes were read")
        if xxhash.xxh3_64_intdigest(into[:block_bytes]) != checksum:
            raise Corrupt(f"disk slot {slot}")


def _open_direct(path: Path) -> int | None:
    """A descriptor with O_DIRECT, or None where the file system cannot do it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        log.warning("no O_DIRECT: the disk tier goes through the page cache", reason=str(error))
        return None
    try:
        os.pwrite(fd, mmap.mmap(-1, _PROBE), 0)
    except OSError as error:
        os.close(fd)
        log.warning("no O_DIRECT: the disk tier goes through the page cache", reason=str(error))
        return None
    return fd
