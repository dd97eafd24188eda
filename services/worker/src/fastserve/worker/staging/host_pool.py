"""The sidecar's pool file in the worker's memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog
import torch

log = structlog.get_logger(__name__)
Bytes = npt.NDArray[np.uint8]
_PAGE = 4096


class HostPool:
    """The pool file, mapped: `slots` [slots, slot_bytes] uint8. Unmapped with its last user."""

    def __init__(self, path: Path, size: int, slot_bytes: int, slots: int) -> None:
        """size: of the file, in bytes. Raises OSError if the file is gone."""
        fd = os.open(path, os.O_RDWR)
        try:
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        with contextlib.suppress(OSError):  # the sidecar says in its log whether there are any
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.slots: Bytes = np.frombuffer(self._map, np.uint8, slots * slot_bytes).reshape(
            slots, slot_bytes
        )

    def prepare(self, device: torch.device) -> None:
        """Do now what the first copies would wait for: map every page, and pin it for a GPU.

        Takes a while for a large pool; call it in a thread.
        """
        self.slots.reshape(-1)[::_PAGE].max()
        if device.type == "cuda":
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            address = self.slots.ctypes.data
            status = int(cudart.cudaHostRegister(address, self.slots.nbytes, 0))
            if status == 0:
                weakref.finalize(self, cudart.cudaHostUnregister, address)
            else:
                # Copies are right all the same, but go through a buffer of the driver.
                log.warning("the host pool is not pinned", cuda_error=status)
