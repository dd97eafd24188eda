"""Copies between KV blocks on the device and slots in the host pool.

Called in the copy thread only. numpy and torch release the interpreter lock during each block's
copy and checksum, so the engine thread goes on meanwhile.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xxhash

Bytes = npt.NDArray[np.uint8]


class HostPool:
    """The sidecar's pool file, mapped: `slots` [slots, slot_bytes] uint8."""

    def __init__(self, path: Path, slot_bytes: int, slots: int) -> None:
        """Raises OSError if the file is gone."""
        fd = os.open(path, os.O_RDWR)
        try:
            self._map = mmap.mmap(fd, slot_bytes * slots)
        finally:
            os.close(fd)
        self.slots: Bytes = np.frombuffer(self._map, np.uint8).reshape(slots, slot_bytes)

    def close(self) -> None:
        """Unmap, as soon as nobody looks at the bytes any more."""
        del self.slots


class Copier:
    """Moves blocks of `kv` (uint8 [blocks, block_bytes], on any device)."""

    def __init__(self, kv: torch.Tensor) -> None:
        self._kv = kv
        self._bytes = kv.shape[1]
        self._stream: torch.cuda.Stream | None = None
        if kv.device.type == "cuda":
            self._stream = torch.cuda.Stream(kv.device)  # type: ignore[no-untyped-call]

    def out(self, pool: HostPool, blocks: Sequence[int], slots: Sequence[int]) -> list[int]:
        """Device to host; the xxh3_64 of each block."""
        views = [torch.from_numpy(pool.slots[slot, : self._bytes]) for slot in slots]
        with torch.cuda.stream(self._stream):
            for view, block in zip(views, blocks, strict=True):
                view.copy_(self._kv[block], non_blocking=self._stream is not None)
        self._wait()
        return [xxhash.xxh3_64_intdigest(view.numpy().data) for view in views]

    def back(
        self, pool: HostPool, slots: Sequence[int], blocks: Sequence[int], checksums: Sequence[int]
    ) -> bool:
        """Host to device; False, before anything is copied, if a checksum differs."""
        views = [torch.from_numpy(pool.slots[slot, : self._bytes]) for slot in slots]
        for view, checksum in zip(views, checksums, strict=True):
            if xxhash.xxh3_64_intdigest(view.numpy().data) != checksum:
                return False
        with torch.cuda.stream(self._stream):
            for view, block in zip(views, blocks, strict=True):
                self._kv[block].copy_(view, non_blocking=self._stream is not None)
        self._wait()
        return True

    def _wait(self) -> None:
        """The copies are over when this returns, so blocks and slots may be used at once."""
        if self._stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
            event.synchronize()
