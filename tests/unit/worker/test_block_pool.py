"""The block pool: every block has one place, whatever is taken and given back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.worker.block_pool import BlockPool, NoFreeBlock


@given(
    count=st.integers(1, 12),
    moves=st.lists(st.tuples(st.booleans(), st.integers(0, 14)), max_size=60),
)
def test_no_block_has_two_owners_and_none_is_lost(
    count: int, moves: list[tuple[bool, int]]
) -> None:
    pool = BlockPool(count)
    owners: list[list[int]] = []
    for take, number in moves:
        if take and number > pool.free:
            before = pool.free
            with pytest.raises(NoFreeBlock, match=f"{number} blocks wanted, {before} free"):
                pool.take(number)
            assert pool.free == before
        elif take:
            taken = pool.take(number)
            assert len(taken) == number
            owners.append(taken)
        elif owners:
            pool.give_back(owners.pop(number % len(owners)))
        owned = [block for owner in owners for block in owner]
        assert len(set(owned)) == len(owned)
        assert set(owned) <= set(range(count))
        assert pool.free + len(owned) == count


def test_every_block_can_be_taken_again() -> None:
    pool = BlockPool(5)
    pool.give_back(pool.take(5))
    assert sorted(pool.take(5)) == [0, 1, 2, 3, 4]


def test_a_double_free_is_an_error() -> None:
    pool = BlockPool(4)
    first, second = pool.take(2)
    pool.give_back([first])
    with pytest.raises(ValueError, match=f"block {first} is freed twice"):
        pool.give_back([first])
    with pytest.raises(ValueError, match=f"block {second} is freed twice"):
        pool.give_back([second, second])
    assert pool.free == 4


def test_a_block_that_was_never_taken_cannot_be_given_back() -> None:
    with pytest.raises(ValueError, match="block 1 is freed twice"):
        BlockPool(4).give_back([1])


class SharingModel:
    """The pool as a plain list of what each block holds, for how many, and when it was freed."""

    def __init__(self, count: int) -> None:
        self.pool = BlockPool(count)
        self.owners: list[list[int]] = []
        self.keys: dict[int, bytes] = {}  # by block
        self.kept: list[int] = []  # the one that was given back first, first

    def take(self, number: int) -> None:
        if number > self.pool.free:
            with pytest.raises(NoFreeBlock):
                self.pool.take(number)
            return
        blank = self.pool.free - len(self.kept)
        evicted = self.kept[: max(0, number - blank)]
        taken = self.pool.take(number)
        assert not set(taken) & self.held, "a block is handed out that somebody holds"
        assert set(taken) & set(self.kept) == set(evicted), "not the least recently used ones"
        del self.kept[: len(evicted)]
        for block in evicted:
            del self.keys[block]
        self.owners.append(taken)

    def share(self, number: int) -> None:
        by_key = {key: block for block, key in self.keys.items()}
        wanted = [bytes([number + at]) for at in range(3)]
        found = list(itertools.takewhile(lambda key: key in by_key, wanted))
        shared = self.pool.share(wanted)
        assert shared == [by_key[key] for key in found]
        self.kept = [block for block in self.kept if block not in shared]
        self.owners.append(shared)

    def register(self, number: int) -> None:
        for owner in self.owners:
            for block in owner:
                key = bytes([number % 8])
                self.pool.register(block, key)
                if block not in self.keys and key not in self.keys.values():
                    self.keys[block] = key
                number += 1

    def give_back(self, number: int) -> None:
        if self.owners:
            owner = self.owners.pop(number % len(self.owners))
            self.pool.give_back(owner)
            self.kept += [b for b in reversed(owner) if b in self.keys and b not in self.held]

    def forget(self, number: int) -> None:
        if self.owners:
            owner = self.owners[number % len(self.owners)]
            self.pool.forget(owner)
            for block in owner:
                self.keys.pop(block, None)

    @property
    def held(self) -> set[int]:
        return {block for owner in self.owners for block in owner}

    def check(self) -> None:
        assert self.pool.free == self.pool.count - len(self.held)
        assert self.pool.kept == len(self.kept)
        for block in range(self.pool.count):
            holders = sum(block in owner for owner in self.owners)
            assert self.pool.shared(block) == (block in self.keys or holders > 1)


@given(
    count=st.integers(1, 8),
    moves=st.lists(
        st.tuples(
            st.sampled_from(["take", "share", "register", "give_back", "forget"]),
            st.integers(0, 7),
        ),
        max_size=60,
    ),
)
def test_cached_blocks_are_shared_and_leave_in_the_order_of_their_use(
    count: int, moves: list[tuple[str, int]]
) -> None:
    model = SharingModel(count)
    for move, number in moves:
        getattr(model, move)(number)
        model.check()
    while model.owners:
        model.give_back(0)
    model.check()
    assert sorted(model.pool.take(count)) == list(range(count))
    assert model.pool.kept == 0


def test_the_end_of_a_chain_goes_before_its_beginning() -> None:
    pool = BlockPool(4)
    chain = pool.take(4)
    keys = [b"0", b"1", b"2", b"3"]
    for block, key in zip(chain, keys, strict=True):
        pool.register(block, key)
    pool.give_back(chain)
    pool.take(2)
    assert pool.share(keys) == chain[:2]
