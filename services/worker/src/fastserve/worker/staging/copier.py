"""Copies between KV blocks on the device and slots in the host pool.

Called in the copy thread only: one call moves all blocks of an operation. The interpreter lock is
released during each block's copy and checksum, so the engine thread goes on meanwhile. The checksum
is computed right after (or before) the copy of the same block, of the bytes that are in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import structlog
import torch
import xxhash

from fastserve.worker.native.build import NativeError
from fastserve.worker.native.library import best_library
from fastserve.worker.staging.host_pool import Bytes, HostPool

log = structlog.get_logger(__name__)
Wait = Callable[[], object]


class Lane(Protocol):
    """How bytes get from one place to the other. Each call returns a function that waits for the
    copy; until it has returned, source and target are in use."""

    def out(self, block: int, slot: Bytes) -> Wait: ...

    def back(self, slot: Bytes, block: int) -> Wait: ...

    def sent(self, block: int, slot: Bytes) -> Bytes:
        """What a copy out that is over has moved, from where it is read soonest."""


class CpuLane:
    """The device is memory too. A copy out is made when it is waited for, just before its checksum;
    a copy back at once, just after it."""

    def __init__(self, kv: torch.Tensor) -> None:
        self._kv: Bytes = kv.numpy()
        self._copy = _fastest_copy()

    def out(self, block: int, slot: Bytes) -> Wait:
        return partial(self._copy, slot, self._kv[block])

    def back(self, slot: Bytes, block: int) -> Wait:
        self._copy(self._kv[block], slot)
        return _nothing

    def sent(self, block: int, slot: Bytes) -> Bytes:
        source: Bytes = self._kv[block]  # its copy went past the cache
        return source


def _nothing() -> None:
    pass


def _fastest_copy() -> Callable[[Bytes, Bytes], None]:
    """Into the first from the second, contiguous and of one size."""
    try:
        library = best_library()
    except NativeError as error:
        log.info("no kernels: KV blocks are copied by numpy, slower", reason=str(error))
        return np.copyto

    def copy(into: Bytes, source: Bytes) -> None:
        library.call("fs_copy", into.ctypes.data, source.ctypes.data, into.nbytes)

    return copy


class CudaLane:
    """Copies on streams of their own, one per direction, beside the model's.

    What they read was written by iterations whose tokens are on the host, and what they write no
    iteration under way uses: there is nothing on the model's stream to wait for.
    """

    def __init__(self, kv: torch.Tensor) -> None:
        self._kv = kv
        self._out = torch.cuda.Stream(kv.device)  # type: ignore[no-untyped-call]
        self._back = torch.cuda.Stream(kv.device)  # type: ignore[no-untyped-call]

    def out(self, block: int, slot: Bytes) -> Wait:
        return _copy(self._out, torch.from_numpy(slot), self._kv[block])

    def back(self, slot: Bytes, block: int) -> Wait:
        return _copy(self._back, self._kv[block], torch.from_numpy(slot))

    def sent(self, block: int, slot: Bytes) -> Bytes:
        return slot


def _copy(stream: torch.cuda.Stream, into: torch.Tensor, source: torch.Tensor) -> Wait:
    with torch.cuda.stream(stream):
        into.copy_(source, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
    wait: Wait = event.synchronize
    return wait


class Copier:
    """Moves blocks of `kv` (uint8 [blocks, block_bytes], on any device)."""

    def __init__(self, kv: torch.Tensor, lane: Lane | None = None) -> None:
        self._bytes = kv.shape[1]
        self.lane = lane or (CudaLane(kv) if kv.device.type == "cuda" else CpuLane(kv))

    def out(self, pool: HostPool, blocks: Sequence[int], slots: Sequence[int]) -> list[int]:
        """Device to host; the xxh3_64 of each block."""
        views = [pool.slots[slot, : self._bytes] for slot in slots]
        waits = [self.lane.out(block, view) for block, view in zip(blocks, views, strict=True)]
        checksums = []
        for wait, block, view in zip(waits, blocks, views, strict=True):
            wait()
            checksums.append(xxhash.xxh3_64_intdigest(self.lane.sent(block, view).data))
        return checksums

    def back(
        self,
        pool: HostPool,
        slots: Sequence[int],
        blocks: Sequence[int],
        checksums: Sequence[int] | None,
    ) -> bool:
        """Host to device; False if a checksum differs, and then the blocks hold nothing of use.

        checksums: None to copy unchecked.
        """
        waits: list[Wait] = []
        intact = True
        for number, (slot, block) in enumerate(zip(slots, blocks, strict=True)):
            view = pool.slots[slot, : self._bytes]
            if checksums is not None:
                intact = xxhash.xxh3_64_intdigest(view.data) == checksums[number]
                if not intact:
                    break
            waits.append(self.lane.back(view, block))
        # Copies that were started must end, whatever became of the rest: their blocks are reused.
        for wait in waits:
            wait()
        return intact
