from __future__ import annotations

import pytest

from fastserve.kv_offload.errors import BlockMissing, NoFreeSlot, PoolFull, SlotError
from fastserve.kv_offload.slots import Holder, SlotTable


def stored(table: SlotTable, job: str, count: int) -> None:
    table.commit(job, table.reserve(job, range(count)), [1] * count, range(count))


def spill(table: SlotTable) -> None:
    block = table.begin_spill()
    assert block is not None
    table.end_spill(block, True)


def test_reserve_commit_lookup_release() -> None:
    table = SlotTable(4, 16)
    slots = table.reserve("a", [0, 1])
    assert table.lookup("a") == []
    table.commit("a", slots, [16, 3], [11, 12])
    found = [(i, b.slot, b.valid_tokens, b.checksum) for i, b in table.lookup("a")]
    assert found == [(0, slots[0], 16, 11), (1, slots[1], 3, 12)]
    assert (table.free, table.reserved, table.committed) == (2, 0, 2)
    assert table.release("a") == 2
    assert table.free == 4
    assert table.release("a") == 0


def test_reserve_is_all_or_nothing() -> None:
    table = SlotTable(2, 16)
    with pytest.raises(PoolFull, match="3 blocks wanted, room for 2"):
        table.reserve("a", [0, 1, 2])
    assert table.free == 2
    assert table.jobs == []


def test_commit_of_a_grown_block_replaces_the_old_slot() -> None:
    table = SlotTable(2, 16)
    table.commit("a", table.reserve("a", [0]), [5], [1])
    table.commit("a", table.reserve("a", [0]), [9], [2])
    [(index, block)] = table.lookup("a")
    assert (index, block.valid_tokens, block.checksum) == (0, 9, 2)
    assert table.free == 1
    table.check_integrity()


@pytest.mark.parametrize(
    ("job", "slots", "tokens", "sums", "why"),
    [
        ("b", [0], [16], [1], "not reserved for job b"),
        ("a", [1], [16], [1], "not reserved"),
        ("a", [0], [0], [1], "0 valid tokens"),
        ("a", [0], [17], [1], "17 valid tokens"),
        ("a", [0, 0], [1, 1], [1, 1], "named twice"),
        ("a", [0], [1, 1], [1], "differ in length"),
    ],
)
def test_wrong_commits_change_nothing(
    job: str, slots: list[int], tokens: list[int], sums: list[int], why: str
) -> None:
    table = SlotTable(2, 16)
    assert table.reserve("a", [0]) == [0]
    with pytest.raises(SlotError, match=why):
        table.commit(job, slots, tokens, sums)
    assert (table.reserved, table.committed) == (1, 0)


def test_block_index_named_twice_is_refused() -> None:
    with pytest.raises(SlotError, match="named twice"):
        SlotTable(4, 16).reserve("a", [1, 1])


def test_reservations_of_a_past_life_are_freed_and_commits_kept() -> None:
    table = SlotTable(4, 16)
    table.commit("a", table.reserve("a", [0]), [16], [1])
    table.reserve("a", [1])
    table.reserve("b", [0])
    assert table.drop_reservations() == 2
    assert table.jobs == ["a"]
    assert len(table.lookup("a")) == 1
    assert table.free == 3


def test_the_headroom_is_not_counted_on() -> None:
    table = SlotTable(8, 16, disk_slots=4)
    assert (table.headroom, table.capacity, table.room) == (1, 11, 11)
    stored(table, "a", 8)
    with pytest.raises(NoFreeSlot):
        table.reserve("b", [0])
    for _ in range(4):
        spill(table)
    stored(table, "b", 3)
    assert (table.room, table.free, table.free_disk) == (0, 1, 0)
    with pytest.raises(PoolFull, match="room for 0"):
        table.reserve("c", [0])
    [(_, first), *_] = table.lookup("a")
    table.begin_fetch(first)  # which is what the headroom is for
    table.end_fetch(first, True)
    spill(table)
    assert (table.free, table.free_disk) == (1, 0)
    table.check_integrity()


def test_the_block_used_longest_ago_is_spilled_first() -> None:
    table = SlotTable(4, 16, disk_slots=4)
    stored(table, "a", 2)
    stored(table, "b", 1)
    [oldest, _] = table.find("a", [0, 1])
    table.pin(oldest)
    table.unpin(oldest)
    order = []
    while (block := table.begin_spill()) is not None:
        order.append((block.job_id, block.index))
        table.end_spill(block, True)
    assert order == [("a", 1), ("b", 0), ("a", 0)]


def test_with_the_disk_closed_room_is_what_the_host_has() -> None:
    table = SlotTable(8, 16, disk_slots=8)
    stored(table, "a", 3)
    spill(table)
    assert table.room == 15 - 3
    table.disk_open = False
    assert table.room == 7 - 2
    assert table.begin_spill() is None


def test_a_block_read_while_it_is_spilled_stays_on_the_host() -> None:
    table = SlotTable(2, 16, disk_slots=2)
    stored(table, "a", 1)
    block = table.begin_spill()
    assert block is not None
    table.pin(block)
    table.end_spill(block, True)
    assert block.readable and table.free_disk == 2
    table.unpin(block)
    spill(table)
    assert not block.readable


def test_slots_of_a_released_job_are_free_only_when_nobody_uses_them() -> None:
    table = SlotTable(3, 16, disk_slots=3)
    stored(table, "a", 2)
    moving, (_, read) = table.begin_spill(), table.find("a", [0, 1])
    assert moving is not None
    table.pin(read)
    assert table.release("a") == 2
    assert (table.free, table.free_disk, table.jobs) == (1, 2, [])
    assert table.room == 5  # there is room, only not yet
    with pytest.raises(NoFreeSlot):
        table.reserve("b", [0, 1])
    table.end_spill(moving, True)
    assert (table.free, table.free_disk) == (2, 3)
    table.unpin(read)
    assert table.free == 3
    table.check_integrity()


def test_a_block_that_is_not_there_is_missing() -> None:
    table = SlotTable(2, 16)
    stored(table, "a", 1)
    with pytest.raises(BlockMissing, match="block 1"):
        table.find("a", [0, 1])
    with pytest.raises(BlockMissing):
        table.find("b", [0])


def test_a_worker_neither_commits_nor_frees_what_a_peer_writes() -> None:
    table = SlotTable(2, 16)
    [slot] = table.reserve("a", [0], Holder.PEER)
    with pytest.raises(SlotError, match="not reserved"):
        table.commit("a", [slot], [1], [1])
    assert table.drop_reservations() == 0
    table.commit("a", [slot], [1], [1], Holder.PEER)
    assert len(table.lookup("a")) == 1
    table.cancel("a", [slot])  # too late: nothing happens
    assert len(table.lookup("a")) == 1


def test_what_a_peer_sends_of_a_job_that_was_released_meanwhile_is_refused() -> None:
    """Else it would lie there for a job that nobody knows any more."""
    table = SlotTable(2, 16)
    [slot] = table.reserve("a", [0], Holder.PEER)
    assert table.release("a") == 0 and table.free == 1, "the peer may be writing"
    with pytest.raises(SlotError, match="not reserved"):
        table.commit("a", [slot], [1], [1], Holder.PEER)
    table.cancel("a", [slot])
    assert table.free == 2 and table.jobs == []


def cache(table: SlotTable, *keys: bytes) -> None:
    slots = table.cache.fill(len(keys))
    table.cache.keep(slots, keys[: len(slots)], [int.from_bytes(key) for key in keys[: len(slots)]])


def cached(table: SlotTable, *keys: bytes) -> int:
    """How many of the keys can be read, from the first on."""
    blocks = table.cache.pin(keys)
    table.cache.unpin(blocks)
    return len(blocks)


def test_cached_blocks_are_room_and_the_least_recently_used_goes_first() -> None:
    table = SlotTable(6, 4, disk_slots=8)
    stored(table, "live", 2)
    room = table.room
    cache(table, b"a", b"b")
    cache(table, b"c", b"d")
    assert (table.free, table.room, table.cache.cached) == (4, room, 4)
    assert cached(table, b"a", b"b") == 2
    table.reserve("new", [0])
    assert cached(table, b"d") == 0  # the end goes before the beginning
    assert cached(table, b"c") == 1
    table.reserve("new", [1, 2, 3])
    assert (table.free, table.cache.cached) == (0, 0)
    assert [block.slot is not None for _, block in table.lookup("live")] == [True, True]
    cache(table, b"e")  # finds no room, and takes none
    assert table.cache.cached == 0
    table.check_integrity()


def test_what_is_read_stays_and_what_nobody_kept_is_free() -> None:
    table = SlotTable(4, 4)
    cache(table, b"a", b"b")
    reading = table.cache.pin([b"a", b"b", b"c"])
    assert [block.key for block in reading] == [b"a", b"b"]
    assert len(table.cache.fill(9)) == 2
    with pytest.raises(NoFreeSlot):
        table.reserve("j", [0])
    assert len(table.cache.fill(1)) == 1  # the two before it were given up
    table.reserve("j", [0])
    cache(table, b"a")  # replaced: the readers keep the old one
    table.cache.unpin(reading)
    assert (table.free, table.cache.cached) == (3, 2)
    table.cache.forget(reading)  # already replaced, or damaged
    assert (table.free, table.cache.cached, cached(table, b"b")) == (3, 1, 0)
    table.check_integrity()


def test_the_cache_ends_with_the_life_of_the_worker() -> None:
    table = SlotTable(4, 4)
    cache(table, b"a")
    reading = table.cache.pin([b"a"])
    table.cache.fill(2)
    table.drop_reservations()
    assert (table.cache.cached, table.free) == (0, 3)
    table.cache.unpin(reading)
    assert table.free == 4
    table.check_integrity()


@pytest.mark.parametrize("twice", [False, True])
def test_only_slots_that_are_filled_can_be_kept(twice: bool) -> None:
    table = SlotTable(4, 4)
    (slot,) = table.cache.fill(1)
    slots = [slot, slot] if twice else [slot, slot + 1]
    with pytest.raises(SlotError):
        table.cache.keep(slots, [b"a", b"b"], [1, 2])
    assert table.cache.cached == 0
    table.cache.keep([slot], [b""], [1])
    assert (table.cache.cached, table.free) == (0, 4)
