"""How the ranks of a group talk: through shared memory on one host, else torch.distributed."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from fastserve.worker.native.library import Library
from fastserve.worker.parallel.groups import Group

Message = npt.NDArray[np.int32]
_PAGE = 4096
_SLOT = 16384  # floats of the all-reduce that are moved at once
_FOREVER = timedelta(days=365)  # an idle group waits; the watchdog ends it if a rank is lost


class Comm(Protocol):
    """Collectives of one rank. Calls of all ranks must match in order. Once a rank is lost they
    raise RuntimeError or do not return: the watchdog ends the process."""

    name: str

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the tensor parallel ranks of this stage; x may be overwritten."""

    def broadcast(self, message: Message | None) -> Message:
        """int32 [n] of rank 0 to all; the others pass None."""

    def send(self, x: torch.Tensor, rank: int) -> None:
        """Without waiting for the receiver."""

    def receive(self, into: torch.Tensor, rank: int) -> None:
        """The next tensor from `rank`, of the shape and dtype of `into`."""

    def finish(self) -> None:
        """The iteration is over: what was sent has been received."""


def _is_float(x: torch.Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_contiguous()


class SharedMemory:
    """One file, mapped by all ranks: an area per stage for the all-reduce, a ring for every pair of
    ranks. Sums are made in the order of ranks, in float32: all ranks get the same
    bits, in every run."""

    name = "shared memory"

    def __init__(self, group: Group, store: Store, library: Library, ring_bytes: int) -> None:
        """ring_bytes: what a rank may send to another within an iteration without waiting."""
        self._group, self._library = group, library
        self._ring = 1 << max(16, (ring_bytes - 1).bit_length())
        tp, size = group.tp, group.size
        area = -(-(tp * 64 + tp * 2 * _SLOT * 4) // _PAGE) * _PAGE
        link = _PAGE + self._ring
        total = group.pp * area + size * size * link
        self._map = self._share(store, total)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._area = base + group.stage * area
        self._links = base + group.pp * area + _PAGE - 128
        self._link = link
        self._turn = ctypes.c_uint32(0)

    def _share(self, store: Store, total: int) -> mmap.mmap:
        """Pages are taken as they are touched, and the file has no name once all have it."""
        group = self._group
        if group.rank == 0:
            folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
            descriptor, name = tempfile.mkstemp(prefix="fastserve-ranks-", dir=folder)
            os.ftruncate(descriptor, total)
            store.set("memory", name)
        else:
            name = store.get("memory").decode()
            descriptor = os.open(name, os.O_RDWR)
        try:
            mapped = mmap.mmap(descriptor, total)
        finally:
            os.close(descriptor)
        if store.add("mapped", 1) == group.size:
            Path(name).unlink()
        return mapped

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self._group.tp == 1:
            return x
        data = x if _is_float(x) else x.float().contiguous()
        self._library.call(
            "fs_ranks_sum",
            *(self._area, self._group.index, self._group.tp, _SLOT),
            *(ctypes.byref(self._turn), data.data_ptr(), data.numel()),
        )
        return data.to(x.dtype)

    def broadcast(self, message: Message | None) -> Message:
        if message is None:
            count = np.empty(1, np.int32)
            self._move("fs_ranks_receive", 0, self._group.rank, count.ctypes.data, 4)
            message = np.empty(int(count[0]), np.int32)
            self._move("fs_ranks_receive", 0, self._group.rank, message.ctypes.data, message.nbytes)
            return message
        whole = np.concatenate((np.array([len(message)], np.int32), message))
        for rank in range(1, self._group.size):
            self._move("fs_ranks_send", 0, rank, whole.ctypes.data, whole.nbytes)
        return message

    def send(self, x: torch.Tensor, rank: int) -> None:
        x = x.contiguous()
        self._move("fs_ranks_send", self._group.rank, rank, x.data_ptr(), x.nbytes)

    def receive(self, into: torch.Tensor, rank: int) -> None:
        self._move("fs_ranks_receive", rank, self._group.rank, into.data_ptr(), into.nbytes)

    def finish(self) -> None:
        pass

    def _move(self, name: str, source: int, target: int, data: int, size: int) -> None:
        ring = self._links + (source * self._group.size + target) * self._link
        self._library.call(name, ring, self._ring, data, size)


class Distributed:
    """torch.distributed: NCCL between GPUs, gloo between CPUs. Messages of the host go by gloo."""

    def __init__(self, group: Group, store: Store, device: torch.device) -> None:
        self._group, self._device = group, device
        backend = "nccl" if device.type == "cuda" else "gloo"
        self.name = backend
        dist.init_process_group(
            backend, store=store, rank=group.rank, world_size=group.size, timeout=_FOREVER
        )
        stages = [[stage * group.tp + i for i in range(group.tp)] for stage in range(group.pp)]
        self._stage = [dist.new_group(ranks, timeout=_FOREVER) for ranks in stages][group.stage]
        self._host = dist.new_group(backend="gloo", timeout=_FOREVER)
        self._sent: list[tuple[Any, torch.Tensor]] = []  # the tensor must live until it is sent

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self._group.tp > 1:
            x = x.contiguous()
            dist.all_reduce(x, group=self._stage)
        return x

    def broadcast(self, message: Message | None) -> Message:
        count = torch.tensor([0 if message is None else len(message)], dtype=torch.int32)
        dist.broadcast(count, 0, group=self._host)
        data = (
            torch.empty(int(count), dtype=torch.int32)
            if message is None
            else torch.from_numpy(message)
        )
        dist.broadcast(data, 0, group=self._host)
        found: Message = data.numpy()
        return found

    def send(self, x: torch.Tensor, rank: int) -> None:
        x = x.contiguous()
        self._sent.append((dist.isend(x, rank, group=self._for(x)), x))

    def receive(self, into: torch.Tensor, rank: int) -> None:
        dist.recv(into, rank, group=self._for(into))

    def finish(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _for(self, x: torch.Tensor) -> Any:
        return self._host if x.device.type == "cpu" else None
