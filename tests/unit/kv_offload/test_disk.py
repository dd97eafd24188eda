from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import xxhash

from fastserve.common.errors import StartupError
from fastserve.kv_offload import disk as module
from fastserve.kv_offload.disk import PREFIX, Corrupt, DiskFile, DiskRegion
from fastserve.kv_offload.scratch import remove_stale

SIZE = 8192


def page_aligned(data: bytes) -> memoryview:
    memory = mmap.mmap(-1, SIZE)
    memory[: len(data)] = data
    return memoryview(memory)


@pytest.mark.parametrize("direct", [True, False])
def test_slots_keep_what_is_written(
    tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(module, "_open_direct", lambda _: None)
    file = DiskFile(tmp_path, 4 * SIZE)
    region = DiskRegion(file, 0, file.size, SIZE)
    assert region.slots == 4
    for slot in range(4):
        region.write(slot, page_aligned(b"%d" % slot * 5000))
    for slot in range(4):
        into, expected = page_aligned(b""), b"%d" % slot * 5000
        region.read(slot, into, 5000, xxhash.xxh3_64_intdigest(expected))
        assert into[:5000] == expected
    with pytest.raises(Corrupt):
        region.read(0, page_aligned(b""), 5000, 1)
    os.truncate(file.path, SIZE)
    with pytest.raises(OSError, match="only 0 of 8192 bytes were read"):
        region.read(2, page_aligned(b""), 5000, 1)
    remove_stale(tmp_path, PREFIX)  # it is in use
    assert file.path.exists()
    file.close()
    assert not file.path.exists()


def test_parts_do_not_overlap_and_begin_at_pages(tmp_path: Path) -> None:
    file = DiskFile(tmp_path, 7 * SIZE)
    share = file.size // 2
    parts = [DiskRegion(file, n * share, share, SIZE) for n in range(2)]
    assert [part.slots for part in parts] == [3, 3]
    for number, part in enumerate(parts):
        for slot in range(part.slots):
            part.write(slot, page_aligned(b"%d%d" % (number, slot)))
    for number, part in enumerate(parts):
        for slot in range(part.slots):
            expected = b"%d%d" % (number, slot)
            part.read(slot, page_aligned(b""), 2, xxhash.xxh3_64_intdigest(expected))
    file.close()


def test_a_file_system_without_o_direct_is_used_with_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    file = DiskFile(tmp_path, SIZE)
    assert module._open_direct(file.path) is None or file.direct
    monkeypatch.setattr(os, "pwrite", refuse)
    assert module._open_direct(file.path) is None
    file.close()


def test_no_room_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"cannot reserve .* Lower --disk-size"):
        DiskFile(tmp_path, 1 << 50)
    assert not list(tmp_path.iterdir())
