from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastserve.kv_offload.slots import Block, PoolFull, SlotError, SlotTable


def test_reserve_commit_lookup_release() -> None:
    table = SlotTable(4, 16)
    slots = table.reserve("a", [0, 1])
    assert table.lookup("a") == []
    table.commit("a", slots, [16, 3], [11, 12])
    assert table.lookup("a") == [(0, Block(slots[0], 16, 11)), (1, Block(slots[1], 3, 12))]
    assert (table.free, table.reserved, table.committed) == (2, 0, 2)
    assert table.release("a") == 2
    assert table.free == 4
    assert table.release("a") == 0


def test_reserve_is_all_or_nothing() -> None:
    table = SlotTable(2, 16)
    with pytest.raises(PoolFull, match="3 slots wanted, 2 free"):
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


class Slots(RuleBasedStateMachine):
    """Any order of calls: the table agrees with a plain model and loses no slot."""

    SLOTS = 6

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(self.SLOTS, 4)
        self.reserved: dict[int, tuple[str, int]] = {}
        self.committed: dict[tuple[str, int], int] = {}

    @rule(job=st.sampled_from("abc"), first=st.integers(0, 3), count=st.integers(1, 3))
    def reserve(self, job: str, first: int, count: int) -> None:
        free = self.SLOTS - len(self.reserved) - len(self.committed)
        if count > free:
            with pytest.raises(PoolFull):
                self.table.reserve(job, range(first, first + count))
            return
        slots = self.table.reserve(job, range(first, first + count))
        for slot, index in zip(slots, range(first, first + count), strict=True):
            assert slot not in self.reserved
            assert slot not in self.committed.values()
            self.reserved[slot] = (job, index)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.reserved)))
        job, index = self.reserved.pop(slot)
        self.table.commit(job, [slot], [2], [slot])
        self.committed[job, index] = slot

    @rule(job=st.sampled_from("abc"))
    def release(self, job: str) -> None:
        gone = [slot for slot, (owner, _) in self.reserved.items() if owner == job]
        gone_blocks = [key for key in self.committed if key[0] == job]
        assert self.table.release(job) == len(gone) + len(gone_blocks)
        for slot in gone:
            del self.reserved[slot]
        for key in gone_blocks:
            del self.committed[key]

    @rule()
    def new_life(self) -> None:
        assert self.table.drop_reservations() == len(self.reserved)
        self.reserved.clear()

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.table.check_integrity()
        assert self.table.reserved == len(self.reserved)
        assert self.table.committed == len(self.committed)
        for job in "abc":
            found = {index: block.slot for index, block in self.table.lookup(job)}
            wanted = {i: slot for (owner, i), slot in self.committed.items() if owner == job}
            assert found == wanted


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
