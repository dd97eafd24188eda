"""The block pool: every block has one place, whatever is taken and given back."""

from __future__ import annotations

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
