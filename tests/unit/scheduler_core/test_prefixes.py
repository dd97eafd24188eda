"""Newcomers go to where the beginning of their prompt was computed, if that is worth it."""

from __future__ import annotations

from typing import Any

from fastserve.scheduler.core import JobSpec, PrefixCache
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.prefixes import Prefixes
from support.worker_groups import Groups


def job(tokens: range, tenant: str = "default", output: tuple[int, ...] = ()) -> Job:
    made = Job(JobSpec("j", tuple(tokens), 10, 0.0, tenant=tenant), 0, 0.0)
    made.output.extend(output)
    return made


def prefixes(blocks: int = 100, cache: PrefixCache = PrefixCache.TENANT) -> Prefixes:
    return Prefixes(cache, 4, blocks)


def test_full_blocks_from_the_beginning_on_count() -> None:
    known = prefixes()
    known.note(job(range(11)))
    assert known.held(job(range(11))) == 8
    assert known.held(job(range(6))) == 4
    assert known.held(job(range(1, 11))) == 0


def test_the_answer_counts_for_the_next_turn_of_a_chat() -> None:
    known = prefixes()
    known.note(job(range(6), output=(6, 7, 8)))
    assert known.held(job(range(20))) == 8


def test_tenants_share_as_the_worker_lets_them() -> None:
    for cache, shared in ((PrefixCache.TENANT, 0), (PrefixCache.ALL, 8), (PrefixCache.OFF, 0)):
        known = prefixes(cache=cache)
        known.note(job(range(8), tenant="a"))
        assert known.held(job(range(8), tenant="b")) == shared
    known = prefixes(cache=PrefixCache.OFF)
    known.note(job(range(8)))
    assert known.held(job(range(8))) == 0


def test_what_was_used_longest_ago_is_forgotten_its_end_first() -> None:
    known = prefixes(blocks=3)
    known.note(job(range(8)))
    known.note(job(range(100, 108)))
    assert known.held(job(range(8))) == 4
    assert known.held(job(range(100, 108))) == 8


def submit(groups: Groups, name: str, prompt: range, **spec: Any) -> str | None:
    groups.lengths[name] = 20
    groups.tokens[name], groups.came[name] = [], []
    spec = {"tenant": "t", **spec}
    groups.scheduler.submit(JobSpec(name, tuple(prompt), 20, groups.now, **spec), groups.now)
    placed = groups.scheduler.job(name)
    return placed.worker_id if placed is not None else None


def test_a_newcomer_goes_where_its_beginning_was_computed() -> None:
    """Both groups are idle; the first of equals is a."""
    groups = Groups({"a": 1.0, "b": 1.0})
    groups.scheduler._groups["b"].prefixes.note(job(range(400), tenant="t"))
    assert submit(groups, "another", range(1000, 1410)) == "a"
    groups.scheduler.cancel("another", groups.now)
    assert submit(groups, "again", range(410)) == "b"


def test_what_was_computed_is_noted() -> None:
    groups = Groups({"a": 1.0})
    submit(groups, "first", range(50))
    held = groups.scheduler._groups["a"].prefixes.held
    groups.step(1)
    assert held(job(range(60), tenant="t")) == 48
    groups.run()
    tokens = [*range(50), *groups.tokens["first"]]
    whole = Job(JobSpec("k", tuple(tokens), 5, 0.0, tenant="t"), 0, 0.0)
    assert held(whole) == 68


def test_a_group_that_is_busy_enough_gets_it_all_the_same_no_more() -> None:
    groups = Groups({"a": 1.0, "b": 1.0})
    there = submit(groups, "first", range(60))
    groups.step(6)
    placed = [submit(groups, f"j{n}", range(60)) for n in range(8)]
    assert placed.count(there) < 8, "one group had everything, and the other one nothing"
