"""The prefix cache on the host: what the device had to give up comes back, and a copy that is late
or of the wrong block, or never comes, costs time only."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.worker.engine import Iteration
from fastserve.worker.job import OpKind
from unit.worker.engine_rig import BLOCK, POISON, Rig

PROMPT = list(range(3 * BLOCK + 1))
SHARED: dict[str, Any] = {"salt": b"tenant:a", "temperature": 0.0}
DEVICE = 8


def small(**settings: Any) -> Rig:
    return Rig(blocks=DEVICE, caches=True, **settings)


def first(rig: Rig, handle: int) -> Iteration:
    """The first iteration of a job, which may have to wait for the host."""
    rig.plan({handle: 1000})
    rig.mover.end_all()
    return rig.step()


def found(rig: Rig, handle: int) -> tuple[int, int]:
    """Tokens that the job found on the device, and on the host."""
    iteration = first(rig, handle)
    ((begun, known, device, host),) = iteration.lookups
    assert (begun, known) == (handle, len(rig.jobs[handle].token_ids))
    assert iteration.rows == [(handle, known - device - host, known)]
    return device, host


def come_and_go(rig: Rig, prompt: list[int], tokens: int = 1, **settings: Any) -> int:
    """A job from its beginning to its end; everything that can be is copied to the host."""
    job = rig.job(prompt, **{**SHARED, **settings})
    first(rig, job)
    rig.run([job], tokens - 1)
    rig.do(OpKind.RELEASE, job)
    rig.mover.end_all()
    return job


def others(rig: Rig) -> None:
    """Jobs that use every block of the device."""
    come_and_go(rig, [50] * (DEVICE * BLOCK), max_tokens=1)


def test_what_the_device_gave_up_comes_from_the_host() -> None:
    rig = small()
    answered = come_and_go(rig, PROMPT, tokens=6)
    others(rig)
    again = rig.job([*PROMPT, *rig.output[answered]], **SHARED)
    assert found(rig, again) == (0, 4 * BLOCK)
    rig.run([again], 5)
    rig.check_output()
    rig.check_blocks()


def test_the_host_goes_on_where_the_device_ends() -> None:
    rig = small()
    come_and_go(rig, PROMPT, tokens=6)
    come_and_go(rig, [50] * (5 * BLOCK), max_tokens=1)  # 4 of 8 were blank
    assert found(rig, rig.job(PROMPT, **SHARED)) == (3 * BLOCK, 0)
    rig.do(OpKind.RELEASE, 3)
    come_and_go(rig, [51] * (6 * BLOCK), max_tokens=1)
    assert found(rig, rig.job(PROMPT, **SHARED)) == (2 * BLOCK, BLOCK)
    rig.check_output()
    rig.check_blocks()


@pytest.mark.parametrize("salt", [b"tenant:b", b""])
def test_what_is_not_shared(salt: bytes) -> None:
    rig = small()
    come_and_go(rig, PROMPT)
    others(rig)
    other = rig.job(PROMPT, **{**SHARED, "salt": salt})
    rig.plan({other: 100})
    assert not rig.mover.under_way
    assert [row[1:] for row in rig.step().rows] == [(len(PROMPT), len(PROMPT))]
    assert rig.mover.cache
    rig.check_output()


def test_nothing_is_copied_while_most_of_the_device_is_empty() -> None:
    rig = Rig(blocks=100, caches=True)
    come_and_go(rig, PROMPT, tokens=6)
    assert not rig.mover.cache
    come_and_go(rig, [50] * (60 * BLOCK), max_tokens=1)
    assert len(rig.mover.cache) > 4


def test_beside_iterations_blocks_are_copied_in_batches_and_the_rest_when_all_is_idle() -> None:
    rig = Rig(blocks=64, caches=True)  # 4 in a batch
    job = rig.job([50] * (38 * BLOCK), **{**SHARED, "max_tokens": 1})
    saved = []
    for blocks in (32, 2, 2, 1):
        rig.plan({job: blocks * BLOCK})
        rig.step()
        rig.mover.end_all()
        saved.append(len(rig.mover.cache))
    assert saved == [32, 32, 36, 36]
    rig.plan({job: BLOCK})
    rig.step()
    assert len(rig.output[job]) == 1
    rig.mover.end_all()
    assert len(rig.mover.cache) == 38


def test_no_iteration_waits_for_a_copy_and_others_run_meanwhile() -> None:
    rig = small()
    come_and_go(rig, PROMPT)
    others(rig)
    job, other = rig.job(PROMPT, **SHARED), rig.job([40], temperature=0.0)
    rig.plan([job, other], lease=5)
    assert [row[0] for row in rig.step().rows] == [other]
    rig.plan([job], lease=5)
    assert not rig.engine.runnable and rig.engine.has_rows
    rig.mover.end_all()
    assert rig.engine.runnable
    iteration = rig.step()
    assert iteration.rows == [(job, 1, len(PROMPT))]
    assert iteration.lookups == [(job, len(PROMPT), 0, 3 * BLOCK)]
    rig.check_output()


@pytest.mark.parametrize("kind", [OpKind.OFFLOAD, OpKind.DROP_DEVICE, OpKind.RELEASE])
def test_an_operation_waits_until_the_beginning_has_come(kind: OpKind) -> None:
    rig = small()
    come_and_go(rig, PROMPT)
    others(rig)
    job = rig.job(PROMPT, **SHARED)
    rig.plan({job: 100})
    number = rig.op(kind, job)
    rig.check_blocks()
    assert rig.idle() is None
    rig.mover.end_all()
    rig.idle()
    assert rig.ended[number].tokens == (3 * BLOCK if kind is OpKind.OFFLOAD else 0)
    assert rig.engine.pool.free == DEVICE


def test_a_block_that_is_taken_during_its_copy_is_not_kept() -> None:
    rig = small()
    job = rig.job(PROMPT, **SHARED)
    rig.run({job: 100}, 5)  # 4 full blocks
    rig.op(OpKind.RELEASE, job)
    assert "save" in [copy.kind for copy in rig.mover.under_way]
    taker = rig.job([50] * (7 * BLOCK), temperature=0.0)  # all but the first block
    rig.run({taker: 100}, 1)
    rig.mover.end_all()
    rig.idle()
    rig.do(OpKind.RELEASE, taker)
    assert len(rig.mover.cache) == 1
    others(rig)
    assert found(rig, rig.job(PROMPT, **SHARED)) == (0, BLOCK)
    rig.check_output()


def test_what_the_host_gave_up_is_computed() -> None:
    rig = small()
    come_and_go(rig, PROMPT)
    others(rig)
    second = list(rig.mover.cache)[1]
    del rig.mover.cache[second]
    job = rig.job(PROMPT, **SHARED)
    assert found(rig, job) == (0, BLOCK)
    rig.check_output()
    rig.check_blocks()


def test_a_host_that_fails_is_not_asked_again_until_it_took_something() -> None:
    rig = small()
    come_and_go(rig, PROMPT)
    others(rig)
    job = rig.job(PROMPT, **SHARED)
    rig.plan({job: 100})
    rig.mover.die()
    rig.mover.end_all()
    iteration = rig.step()
    assert iteration.lookups == [(job, len(PROMPT), 0, 0)]
    assert iteration.rows == [(job, len(PROMPT), len(PROMPT))]
    rig.do(OpKind.RELEASE, job)
    rig.mover.end_all()
    assert rig.mover.cache, "the new sidecar gets what the device has"
    others(rig)
    assert found(rig, rig.job(PROMPT, **SHARED)) == (0, 3 * BLOCK)
    rig.check_output()


def test_without_a_free_block_there_is_no_copy() -> None:
    rig = small()
    come_and_go(rig, PROMPT)
    big = rig.job([50] * (DEVICE * BLOCK - 1), temperature=0.0)
    rig.run({big: 100}, 1)
    job = rig.job(PROMPT, **SHARED)
    rig.plan({job: 100})
    assert not rig.mover.loading
    assert rig.step().stalled == [job]
    rig.check_blocks()


def test_what_fails_is_forgotten_on_the_host_too() -> None:
    rig = small()
    bad = [*PROMPT, *range(20, 24)]
    job = rig.job(bad, **SHARED)
    rig.run({job: 4 * BLOCK}, 1)
    rig.mover.end_all()
    rig.do(OpKind.RELEASE, job)
    poisoned = rig.job([*bad, POISON], **SHARED)
    rig.plan({poisoned: 100})
    rig.step()
    assert rig.failed
    rig.do(OpKind.RELEASE, poisoned)
    rig.mover.end_all()
    others(rig)
    again = rig.job(bad, **SHARED)
    rig.plan({again: 100})
    assert not rig.mover.loading


def test_a_stream_that_breaks_during_the_copy() -> None:
    rig = small()
    come_and_go(rig, PROMPT)
    others(rig)
    job = rig.job(PROMPT, **SHARED)
    rig.plan({job: 100})
    rig.engine.detach()
    rig.mover.end_all()  # the worker waits for that
    held = rig.engine.reset(rig.plan_id, rig.mover.inventory)
    assert held == {f"job-{job}": (3 * BLOCK, 0)}
    rig.resend(job)
    rig.run({job: 100}, 4)
    rig.check_output()
    rig.check_blocks()
