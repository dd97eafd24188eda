"""Copies between blocks and slots: right bytes, damage noticed, nothing under way at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from fastserve.worker.staging.copier import Copier, CpuLane, CudaLane, Wait
from fastserve.worker.staging.host_pool import Bytes, HostPool

BLOCKS, SLOTS, SIZE, SLOT = 6, 8, 5000, 8192


@pytest.fixture
def kv() -> torch.Tensor:
    return torch.randint(0, 256, (BLOCKS, SIZE), dtype=torch.uint8)


@pytest.fixture
def pool(tmp_path: Path) -> HostPool:
    (tmp_path / "pool").write_bytes(bytes(SLOTS * SLOT))
    pool = HostPool(tmp_path / "pool", SLOTS * SLOT, SLOT, SLOTS)
    pool.prepare(torch.device("cpu"))
    return pool


class LateLane(CpuLane):
    """Copies as a GPU does them: begun in order, done at some time before the wait ends."""

    def __init__(self, kv: torch.Tensor) -> None:
        super().__init__(kv)
        self.under_way = 0

    def out(self, block: int, slot: Bytes) -> Wait:
        return self._late(slot, self._kv[block])

    def back(self, slot: Bytes, block: int) -> Wait:
        return self._late(self._kv[block], slot)

    def _late(self, into: Bytes, source: Bytes) -> Wait:
        self.under_way += 1

        def wait() -> None:
            self.under_way -= 1
            np.copyto(into, source)

        return wait


@pytest.mark.parametrize("lane", [CpuLane, LateLane])
def test_blocks_go_out_and_come_back(kv: torch.Tensor, pool: HostPool, lane: type[CpuLane]) -> None:
    before = kv.clone()
    copier = Copier(kv, lane(kv))
    checksums = copier.out(pool, [4, 0, 2], [1, 7, 3])
    assert checksums == [xxhash.xxh3_64_intdigest(before[b].numpy().data) for b in (4, 0, 2)]
    assert (pool.slots[1, :SIZE] == before[4].numpy()).all()
    assert not pool.slots[0].any() and not pool.slots[1, SIZE:].any()
    kv.zero_()
    assert copier.back(pool, [1, 7, 3], [0, 1, 2], checksums)
    assert torch.equal(kv[:3], before[[4, 0, 2]])
    assert not kv[3:].any()


@pytest.mark.parametrize("lane", [CpuLane, LateLane])
def test_a_damaged_slot_is_noticed_if_asked(
    kv: torch.Tensor, pool: HostPool, lane: type[CpuLane]
) -> None:
    chosen = lane(kv)
    copier = Copier(kv, chosen)
    checksums = copier.out(pool, [0, 1, 2], [0, 1, 2])
    pool.slots[1, 77] ^= 1
    assert not copier.back(pool, [0, 1, 2], [3, 4, 5], checksums)
    if isinstance(chosen, LateLane):
        assert chosen.under_way == 0  # the copy of the first block ended, though nobody wants it
    assert copier.back(pool, [0, 1, 2], [3, 4, 5], None)
    assert not torch.equal(kv[4], kv[1]) and torch.equal(kv[5], kv[2])


class FakeCuda:
    """Streams and events that keep a diary."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.diary: list[str] = []
        self._streams = 0
        monkeypatch.setattr(torch.cuda, "Stream", self._stream)
        monkeypatch.setattr(torch.cuda, "Event", lambda: self)
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        real = torch.Tensor.copy_

        def copy(into: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
            assert non_blocking
            self.diary.append("copy")
            return real(into, source)

        monkeypatch.setattr(torch.Tensor, "copy_", copy)
        digest = xxhash.xxh3_64_intdigest

        def noted(data: memoryview) -> int:
            self.diary.append("checksum")
            return int(digest(data))

        monkeypatch.setattr(xxhash, "xxh3_64_intdigest", noted)

    def _stream(self, _: torch.device) -> str:
        self._streams += 1
        return f"stream {self._streams}"

    @contextlib.contextmanager
    def _on(self, stream: str) -> Iterator[None]:
        self.diary.append(f"enter {stream}")
        yield
        self.diary.append("leave")

    def record(self, stream: str) -> None:
        self.diary.append(f"record {stream}")

    def synchronize(self) -> None:
        self.diary.append("wait")


def test_on_a_gpu_every_copy_has_its_event_on_the_stream_of_its_direction(
    kv: torch.Tensor, pool: HostPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(monkeypatch)
    copier = Copier(kv, CudaLane(kv))
    checksums = copier.out(pool, [0, 1], [5, 6])
    first = ["enter stream 1", "copy", "record stream 1", "leave"]
    assert cuda.diary == [*first, *first, "wait", "checksum", "wait", "checksum"]
    cuda.diary.clear()
    assert copier.back(pool, [5, 6], [2, 3], checksums)
    second = ["checksum", "enter stream 2", "copy", "record stream 2", "leave"]
    assert cuda.diary == [*second, *second, "wait", "wait"]
    assert torch.equal(kv[2:4], kv[:2])
