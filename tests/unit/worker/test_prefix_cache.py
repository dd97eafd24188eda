"""The prefix cache: equal beginnings are computed once, and nobody notices but by the time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from fastserve.worker.job import OpKind
from unit.worker.engine_rig import BLOCK, POISON, Rig

PROMPT = list(range(3 * BLOCK + 1))
SHARED: dict[str, Any] = {"salt": b"tenant:a", "temperature": 0.0}


def found(rig: Rig, handle: int) -> int:
    """Runs the first iteration of a job: how many of its tokens were in the cache."""
    (iteration,) = rig.run({handle: 100}, 1)
    ((begun, known, cached, _),) = iteration.lookups
    ((row, new, computed),) = iteration.rows
    assert (begun, row) == (handle, handle)
    assert (known, new, computed) == (len(rig.jobs[handle].token_ids), known - cached, known)
    return cached


def test_the_second_job_computes_what_the_first_did_not() -> None:
    rig = Rig()
    first, second = rig.job(PROMPT, **SHARED), rig.job([*PROMPT, 50, 51], **SHARED)
    assert found(rig, first) == 0
    assert found(rig, second) == 3 * BLOCK
    assert rig.engine.pool.free == 100 - 4 - 1
    rig.run([first, second], 20)
    rig.check_output()
    rig.check_blocks()


def test_the_last_known_token_is_always_computed() -> None:
    rig = Rig()
    found(rig, rig.job(PROMPT[: 2 * BLOCK], **SHARED))
    again = rig.job(PROMPT[: 2 * BLOCK], **SHARED)
    assert found(rig, again) == BLOCK
    assert len(rig.output[again]) == 1
    rig.check_output()


def test_what_was_answered_is_part_of_the_next_prompt() -> None:
    rig = Rig()
    first = rig.job(PROMPT, **SHARED)
    rig.run({first: 100}, 12)
    rig.do(OpKind.RELEASE, first)
    assert rig.engine.pool.free == 100
    turn = rig.job([*PROMPT, *rig.output[first], 50], **SHARED)
    assert found(rig, turn) == (len(PROMPT) + 11) // BLOCK * BLOCK
    rig.check_output()


@pytest.mark.parametrize(
    ("prompt", "salt"),
    [
        (PROMPT, b"tenant:b"),
        (PROMPT, b""),
        ([59, *PROMPT[1:]], b"tenant:a"),
    ],
    ids=["other salt", "no salt", "other beginning"],
)
def test_what_is_not_shared(prompt: list[int], salt: bytes) -> None:
    """The last one has all blocks but the first in common with the first job."""
    rig = Rig()
    found(rig, rig.job(PROMPT, **SHARED))
    other = rig.job(prompt, **{**SHARED, "salt": salt})
    (iteration,) = rig.run({other: 100}, 1)
    assert [cached for _, _, cached, _ in iteration.lookups] == ([0] if salt else [])
    assert iteration.rows == [(other, len(prompt), len(prompt))]
    rig.check_output()


def test_jobs_without_a_salt_leave_nothing() -> None:
    rig = Rig()
    job = rig.job(PROMPT, temperature=0.0)
    rig.run({job: 100}, 5)
    rig.do(OpKind.RELEASE, job)
    assert rig.engine.pool.kept == 0


def test_the_least_recently_used_goes_and_no_live_job_loses_anything() -> None:
    rig = Rig(blocks=12)
    live = rig.job(PROMPT, **SHARED)  # 4 blocks
    found(rig, live)
    old, young = [60, *PROMPT], [61, *PROMPT]
    for prompt in (old, young):
        job = rig.job(prompt, **SHARED)
        found(rig, job)
        rig.do(OpKind.RELEASE, job)
    assert (rig.engine.pool.free, rig.engine.pool.kept) == (8, 6)
    newcomer = rig.job([59, *PROMPT], **SHARED)  # 2 blank blocks and 2 of the old one's
    assert found(rig, newcomer) == 0
    assert rig.engine.pool.kept == 4
    rig.run([live], 3)
    assert len(rig.output[live]) == 4
    rig.do(OpKind.RELEASE, newcomer)
    assert found(rig, rig.job(young, **SHARED)) == 3 * BLOCK
    assert found(rig, rig.job(old, **SHARED)) == BLOCK  # its end went first
    rig.check_output()
    rig.check_blocks()


def test_what_fails_is_not_offered() -> None:
    rig = Rig()
    bad = [*PROMPT, POISON]
    rig.run({rig.job(bad, **SHARED): 100}, 1)
    assert rig.failed
    rig.do(OpKind.RELEASE, 1)
    assert rig.engine.pool.kept == 0


def test_a_block_is_lent_while_it_is_copied_out_and_not_while_it_is_loaded() -> None:
    rig = Rig()
    first = rig.job(PROMPT, **SHARED)
    found(rig, first)
    rig.op(OpKind.OFFLOAD, first)
    second = rig.job([*PROMPT, 40], **SHARED)
    assert found(rig, second) == 3 * BLOCK
    rig.op(OpKind.OFFLOAD, second)  # two copies read the same blocks
    rig.mover.end_all()
    rig.idle()
    assert rig.engine.pool.free == 100
    rig.engine.pool.give_back(rig.engine.pool.take(100))  # nothing is in the cache any more
    rig.op(OpKind.UPLOAD, first)
    third = rig.job(PROMPT, **SHARED)
    assert found(rig, third) == 0
    rig.mover.end_all()
    rig.idle()
    rig.do(OpKind.UPLOAD, second)
    rig.run([first, second, third], 8)
    rig.check_output()
    rig.check_blocks()


def test_recomputing_takes_from_the_cache_too() -> None:
    rig = Rig()
    job = rig.job(PROMPT, **SHARED)
    rig.run({job: 100}, 4)
    rig.do(OpKind.DROP_DEVICE, job)
    (iteration,) = rig.run({job: 100}, 1)
    full = (len(PROMPT) + 3) // BLOCK * BLOCK
    assert iteration.lookups == [(job, len(PROMPT) + 4, full, 0)]
    rig.run([job], 5)
    rig.check_output()


def test_the_next_stream_finds_the_cache_and_writes_in_no_shared_block() -> None:
    """The job is known to have fewer tokens than before: what is to be computed again lies in a
    full block, which another job reads."""
    rig = Rig()
    first = rig.job(PROMPT, **SHARED)
    rig.run({first: 100}, 4)  # 16 computed: 4 full blocks
    reader = rig.job([*PROMPT, *rig.output[first], 50], **SHARED)
    assert found(rig, reader) == 4 * BLOCK
    held = rig.engine.reset(rig.plan_id, {})
    assert held["job-1"] == (4 * BLOCK, 0)
    rig.resend(first, known=2)
    rig.resend(reader)
    rig.run([first, reader], 6)
    rig.check_output()
    rig.check_blocks()


def test_output_that_the_host_may_have_otherwise_is_not_offered() -> None:
    """The host has KV of output that the next scheduler has not heard of: it is sampled again."""
    rig = Rig()
    job = rig.job(PROMPT, **SHARED)
    rig.run({job: 100}, 12)
    rig.do(OpKind.OFFLOAD, job)
    rig.engine.pool.give_back(rig.engine.pool.take(100))
    rig.engine.reset(rig.plan_id, rig.mover.inventory)
    rig.resend(job, known=3)
    rig.do(OpKind.UPLOAD, job)
    rig.run([job], 12)
    rig.do(OpKind.RELEASE, job)
    assert rig.engine.pool.kept == (len(PROMPT) + 3) // BLOCK
    rig.check_output()


def test_a_worker_that_starts_anew_has_an_empty_cache_and_the_host_fills_it() -> None:
    former, rig = Rig(), Rig()
    job = former.job(PROMPT, **SHARED)
    former.run({job: 100}, 8)
    former.do(OpKind.OFFLOAD, job)
    rig.mover.host = former.mover.host
    rig.engine.reset(0, rig.mover.inventory)
    assert rig.job(PROMPT, output=former.output[job], **SHARED) == job
    other = rig.job(PROMPT, **SHARED)
    assert found(rig, other) == 0
    rig.do(OpKind.RELEASE, other)
    rig.engine.pool.give_back(rig.engine.pool.take(100))
    rig.do(OpKind.UPLOAD, job)
    rig.run([job], 3)
    assert found(rig, rig.job(PROMPT, **SHARED)) == 3 * BLOCK
    rig.check_output()
    rig.check_blocks()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_greedy_tokens_are_those_without_a_cache(order: tuple[int, ...]) -> None:
    prompts = [PROMPT, [*PROMPT, 7], PROMPT[:BLOCK] + [9] * BLOCK]
    outputs = []
    for salt in (b"", b"all"):
        rig = Rig(blocks=10)  # too few for all of them
        jobs = [rig.job(prompt, salt=salt, temperature=0.0, max_tokens=8) for prompt in prompts]
        for index in order * 4:
            rig.run({jobs[index]: 3}, 3)
            kind = [OpKind.OFFLOAD, OpKind.DROP_DEVICE, OpKind.OFFLOAD][index]
            rig.do(kind, jobs[index])
            if kind is OpKind.OFFLOAD:
                rig.do(OpKind.UPLOAD, jobs[index])
            rig.check_blocks()
        for job in jobs:
            for other in jobs:
                rig.do(OpKind.DROP_DEVICE, other)
            rig.do(OpKind.DROP_HOST, job)
            rig.run({job: 9}, 20)
        rig.check_output()
        outputs.append([rig.output[job] for job in jobs])
        assert all(len(output) == 8 for output in outputs[-1])
    assert outputs[0] == outputs[1]
