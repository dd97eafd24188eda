"""KV operations: what moves, what stays, and that no block is used while a copy is under way."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastserve.worker.job import OpKind, OpStatus
from unit.worker.engine_rig import BLOCK, Rig

OFFLOAD, UPLOAD = OpKind.OFFLOAD, OpKind.UPLOAD
COPY_OUT = OpKind.COPY_OUT
DROP_DEVICE, DROP_HOST, RELEASE = OpKind.DROP_DEVICE, OpKind.DROP_HOST, OpKind.RELEASE


def test_offload_and_upload_give_the_undisturbed_tokens() -> None:
    rig = Rig()
    job = rig.job(range(10))
    rig.run([job], 5)  # 10 tokens in 2 iterations, then 3 decodes: 13 computed, 14 known
    out = rig.do(OFFLOAD, job)
    assert (out.status, out.tokens) == (OpStatus.OK, 13)
    assert (out.bytes, out.seconds) == (4 * rig.kv.block_bytes, 0.5)
    assert rig.engine.pool.free == 100
    rig.kv.data.fill_(-1)
    back = rig.do(UPLOAD, job)
    assert (back.status, back.tokens, back.bytes) == (OpStatus.OK, 13, 4 * rig.kv.block_bytes)
    (iteration,) = rig.run([job], 1)
    assert iteration.rows == [(job, 1, 14)]
    rig.run([job], 4)
    assert len(rig.output[job]) == 9
    rig.check_output()
    rig.check_blocks()


def test_blocks_stay_with_the_copy_until_it_ends() -> None:
    rig = Rig(blocks=4)
    leaving, waiting = rig.job(range(11)), rig.job(range(9))
    rig.run({leaving: 50}, 1)
    assert rig.engine.pool.free == 1
    rig.plan({waiting: 50}, ops=[(OFFLOAD, leaving)])
    assert rig.step().stalled == [waiting]
    assert rig.engine.pool.free == 1
    rig.check_blocks()
    rig.mover.end_all()
    assert rig.engine.pool.free == 4
    rig.run({waiting: 50}, 1)
    back = rig.op(UPLOAD, leaving)  # needs three blocks, one is free
    rig.idle()
    assert rig.ended[back].status is OpStatus.NO_DEVICE_SPACE
    rig.do(RELEASE, waiting)
    back = rig.op(UPLOAD, leaving)
    assert rig.engine.pool.free == 1  # taken when the copy starts
    rig.mover.end_all()
    rig.idle()
    assert rig.ended[back].status is OpStatus.OK
    rig.run([leaving], 3)
    rig.check_output()


def test_a_row_waits_for_the_upload() -> None:
    rig = Rig()
    job, other = rig.job(range(6)), rig.job([3])
    rig.run([job, other], 3)
    rig.op(OFFLOAD, job)
    rig.plan([job, other])
    rig.step()
    assert rig.failed == {job: "a row for a job whose KV is moving"}
    assert len(rig.output[other]) == 4


def test_only_what_the_host_lacks_is_stored() -> None:
    rig = Rig()
    job = rig.job(range(2 * BLOCK + 2))
    rig.run({job: 50}, 1)
    assert rig.do(OFFLOAD, job).bytes == 3 * rig.kv.block_bytes
    rig.do(UPLOAD, job)
    assert rig.do(OFFLOAD, job).bytes == 0
    rig.do(UPLOAD, job)
    rig.run([job], 6)
    again = rig.do(OFFLOAD, job)
    assert again.tokens == 2 * BLOCK + 2 + 6
    assert again.bytes == 2 * rig.kv.block_bytes  # the part-filled block again, and a new one
    clean = rig.do(OFFLOAD, job)
    assert (clean.status, clean.tokens, clean.bytes) == (OpStatus.OK, 16, 0)
    rig.do(UPLOAD, job)
    rig.run([job], 5)
    rig.check_output()


def test_a_full_host_leaves_the_job_on_the_device() -> None:
    rig = Rig(capacity=2)
    job = rig.job(range(10))
    rig.run([job], 4)
    refused = rig.do(OFFLOAD, job)
    assert (refused.status, refused.tokens, refused.bytes) == (OpStatus.NO_HOST_SPACE, 0, 0)
    (iteration,) = rig.run([job], 1)
    assert iteration.rows == [(job, 1, 13)]
    rig.check_output()


def test_a_full_device_leaves_the_job_on_the_host() -> None:
    rig = Rig(blocks=5)
    job, greedy = rig.job(range(10)), rig.job(range(12))
    rig.run({job: 50}, 1)
    rig.do(OFFLOAD, job)
    rig.run({greedy: 50}, 1)
    refused = rig.do(UPLOAD, job)
    assert (refused.status, refused.tokens) == (OpStatus.NO_DEVICE_SPACE, 0)
    rig.do(RELEASE, greedy)
    assert rig.do(UPLOAD, job).tokens == 10
    rig.run([job], 2)
    rig.check_output()


@pytest.mark.parametrize("when", ["before", "under way", "damaged"])
def test_a_lost_host_copy_is_recomputed(when: str) -> None:
    rig = Rig()
    job = rig.job(range(10))
    rig.run([job], 5)
    rig.do(OFFLOAD, job)
    if when == "damaged":
        del rig.mover.host["job-1"][1]
    if when == "before":
        rig.mover.die()
    number = rig.op(UPLOAD, job)
    if when == "under way":
        rig.mover.die()
    rig.mover.end_all()
    rig.idle()
    assert (rig.ended[number].status, rig.ended[number].tokens) == (OpStatus.LOST, 0)
    assert rig.engine.pool.free == 100
    done = rig.run({job: 6}, 4)
    assert [row[2] for iteration in done for row in iteration.rows] == [6, 12, 14, 15]
    assert rig.do(OFFLOAD, job).bytes == 4 * rig.kv.block_bytes  # the host has none of it
    assert rig.do(UPLOAD, job).status is OpStatus.OK
    rig.run([job], 2)
    rig.check_output()


def test_a_new_sidecar_gets_all_blocks_again() -> None:
    rig = Rig()
    job = rig.job(range(10))
    rig.run([job], 3)
    rig.do(OFFLOAD, job)
    rig.do(UPLOAD, job)
    rig.mover.die()
    rig.run([job], 3)
    assert rig.do(OFFLOAD, job).bytes == 4 * rig.kv.block_bytes
    assert rig.do(UPLOAD, job).status is OpStatus.OK
    rig.run([job], 3)
    rig.check_output()


def test_drop_device_with_and_without_a_host_copy() -> None:
    rig = Rig()
    job = rig.job(range(10))
    rig.run([job], 4)
    assert rig.do(DROP_DEVICE, job).status is OpStatus.OK
    assert rig.engine.pool.free == 100
    (iteration,) = rig.run({job: 50}, 1)
    assert iteration.rows == [(job, 13, 13)]  # recomputed, then sampled on
    rig.do(OFFLOAD, job)
    rig.do(UPLOAD, job)
    rig.run([job], 2)
    dropped = rig.do(DROP_DEVICE, job)
    assert (dropped.status, dropped.tokens) == (OpStatus.OK, 13)
    assert rig.do(UPLOAD, job).tokens == 13
    done = rig.run([job], 2)
    assert done[0].rows == [(job, 3, 16)]  # what was computed after the copy is computed again
    rig.check_output()


def test_drop_host_keeps_the_device_copy() -> None:
    rig = Rig()
    job = rig.job(range(10))
    rig.run([job], 4)
    rig.do(OFFLOAD, job)
    rig.do(UPLOAD, job)
    assert rig.do(DROP_HOST, job).status is OpStatus.OK
    assert not rig.mover.host
    (iteration,) = rig.run([job], 1)
    assert iteration.rows == [(job, 1, 13)]
    assert rig.do(OFFLOAD, job).bytes == 4 * rig.kv.block_bytes
    rig.do(DROP_HOST, job)
    assert rig.do(UPLOAD, job).status is OpStatus.LOST
    rig.run({job: 50}, 2)
    rig.check_output()


def test_full_blocks_are_copied_out_while_the_job_runs_on() -> None:
    rig = Rig()
    job = rig.job(range(2 * BLOCK + 2))
    rig.run({job: 50}, 1)
    number = rig.op(COPY_OUT, job, 10)
    (copy,) = rig.mover.under_way
    assert len(copy.blocks) == 2  # the third is not full yet, and being written
    rig.run([job], 3)
    assert len(rig.output[job]) == 4 and number not in rig.ended
    rig.check_blocks()
    rig.mover.end_all()
    rig.run([job], 1)
    result = rig.ended[number]
    assert (result.status, result.tokens) == (OpStatus.OK, 2 * BLOCK)  # not what it has by now
    # What is on the host already is not copied again when it leaves, and is good.
    assert rig.do(OFFLOAD, job).bytes == 2 * rig.kv.block_bytes
    rig.kv.data.fill_(-1)
    assert rig.do(UPLOAD, job).tokens == 2 * BLOCK + 6
    rig.run([job], 3)
    rig.check_output()


def test_so_many_blocks_at_the_most_are_copied_out() -> None:
    rig = Rig(capacity=5)
    job = rig.job(range(4 * BLOCK + 1))
    rig.run({job: 50}, 1)
    assert rig.do(COPY_OUT, job, 3).tokens == 3 * BLOCK
    assert rig.do(COPY_OUT, job, 3).bytes == rig.kv.block_bytes
    nothing = rig.do(COPY_OUT, job, 3)
    assert (nothing.status, nothing.tokens, nothing.bytes) == (OpStatus.OK, 4 * BLOCK, 0)
    rig.run([job], 2 * BLOCK)
    refused = rig.do(COPY_OUT, job, 3)
    assert (refused.status, refused.tokens) == (OpStatus.NO_HOST_SPACE, 0)
    rig.do(DROP_DEVICE, job)
    assert rig.do(UPLOAD, job).tokens == 4 * BLOCK  # what was there before is there still
    rig.run({job: 50}, 3)
    rig.check_output()


def test_blocks_stay_until_their_copy_has_ended_whatever_comes_behind_it() -> None:
    rig = Rig(blocks=6)
    job, other = rig.job(range(2 * BLOCK + 1)), rig.job(range(3 * BLOCK))
    rig.run({job: 50}, 1)
    rig.plan(ops=[(COPY_OUT, job, 2), (DROP_DEVICE, job)])
    rig.plan({other: 50})
    assert rig.engine.pool.free == 3  # nobody may write into what is being copied
    rig.step()
    rig.check_blocks()
    rig.plan({job: 50}, lease=1)
    rig.idle()
    assert rig.failed == {job: "a row for a job whose KV is moving"}
    rig.mover.end_all()
    assert rig.engine.pool.free == 3
    assert rig.do(UPLOAD, job).tokens == 2 * BLOCK
    rig.run([job], 2)
    rig.check_output()


def test_a_new_sidecar_gets_full_blocks_from_the_first_again() -> None:
    rig = Rig()
    job = rig.job(range(3 * BLOCK + 1))
    rig.run({job: 50}, 1)
    rig.do(COPY_OUT, job, 2)
    rig.mover.die()
    assert rig.do(COPY_OUT, job, 9).bytes == 3 * rig.kv.block_bytes
    number = rig.op(COPY_OUT, job, 9)
    rig.idle()
    assert rig.ended[number].tokens == 3 * BLOCK


def test_operations_on_one_job_run_one_after_the_other() -> None:
    rig = Rig()
    job = rig.job(range(10))
    rig.run([job], 4)
    kinds = [OFFLOAD, UPLOAD, DROP_HOST, OFFLOAD, DROP_DEVICE, UPLOAD, RELEASE]
    numbers = rig.plan(ops=[(kind, job) for kind in kinds])
    order = []
    while rig.mover.under_way:
        assert len(rig.mover.under_way) == 1
        order.append(rig.mover.under_way[0].kind)
        rig.check_blocks()
        rig.mover.end()
    report = rig.idle()
    assert report is not None
    assert [result.op_id for result in report.ops] == numbers
    assert order == ["store", "load", "release", "store", "load", "release"]
    assert {result.status for result in report.ops} == {OpStatus.OK}
    assert rig.engine.pool.free == 100 and not rig.mover.host


def test_copies_of_different_jobs_end_in_any_order() -> None:
    rig = Rig()
    jobs = [rig.job(range(i + 5)) for i in range(4)]
    rig.run(jobs, 4)
    first = rig.plan(ops=[(OFFLOAD, job) for job in jobs])
    for _ in jobs:
        rig.mover.end(-1)
    report = rig.idle()
    assert report is not None and [result.op_id for result in report.ops] == first[::-1]
    rig.plan(ops=[(UPLOAD, job) for job in jobs])
    for _ in jobs:
        rig.mover.end(-1)
    rig.run(jobs, 4)
    rig.check_output()


def test_completions_travel_with_the_next_iteration() -> None:
    rig = Rig()
    leaving, running = rig.job(range(10)), rig.job([1])
    rig.run([leaving, running], 4)
    rig.plan([running], ops=[(OFFLOAD, leaving)], lease=3)
    assert rig.step().ops == []
    rig.mover.end()
    (result,) = rig.step().ops
    assert (result.op_id, result.status) == (1, OpStatus.OK)
    assert rig.step().ops == []


def test_a_reset_forgets_results_and_queued_operations() -> None:
    rig = Rig()
    job = rig.job(range(10))
    rig.run([job], 4)
    rig.plan(ops=[(OFFLOAD, job), (UPLOAD, job)])
    rig.mover.end_all()
    rig.engine.reset(rig.plan_id, rig.mover.inventory)
    assert rig.engine.ended_report() is None
    rig.resend(job)
    rig.run([job], 3)
    rig.check_output()


def test_an_iteration_without_a_choice_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy of what it wrote may begin right after it, and its time is to be known."""
    rig, settled = Rig(), list[int]()
    monkeypatch.setattr(rig.kv, "settle", lambda: settled.append(len(rig.model.batches)))
    job = rig.job(range(12))
    rig.run({job: 5}, 4)  # two chunks, the rest with a token, and a decode
    assert len(rig.output[job]) == 2 and settled == [1, 2]


# --- beside an iteration --------------------------------------------------------------------------


def beside(rig: Rig, row: int, act: Callable[[], None]) -> None:
    """One iteration of a job, and what happens while the model computes it."""
    acted = False

    def once() -> None:
        nonlocal acted
        if not acted:
            acted = True
            act()

    rig.model.beside = once
    rig.plan([row])
    rig.step()
    rig.model.beside = lambda: None
    assert acted


def computed(rig: Rig, *lengths: int) -> list[int]:
    """Jobs with so many tokens on the device."""
    jobs = [rig.job(range(length)) for length in lengths]
    rig.run(dict.fromkeys(jobs, 50), 1)
    return jobs


def test_who_has_no_row_is_copied_while_others_compute() -> None:
    """There and back within one iteration, in blocks that became free in it."""
    rig = Rig(blocks=8)
    runs, leaves = computed(rig, 9, 12)
    back: list[int] = []

    def act() -> None:
        (out,), begun = rig.plan_beside(ops=[(OFFLOAD, leaves)])
        assert begun == 1 and rig.mover.under_way
        rig.mover.end_all()
        rig.idle()
        assert rig.ended[out].status is OpStatus.OK and rig.engine.pool.free == 5
        numbers, begun = rig.plan_beside([runs], ops=[(UPLOAD, leaves)])
        back.extend(numbers)
        assert begun == 1
        rig.mover.end_all()
        rig.idle()
        rig.check_blocks()

    beside(rig, runs, act)
    assert rig.ended[back[0]].status is OpStatus.OK and rig.ended[back[0]].tokens == 12
    rig.run([runs, leaves], 3)
    assert not rig.failed
    rig.check_output()


def test_who_has_a_row_waits_for_the_boundary_and_so_do_all_behind_it() -> None:
    rig = Rig()
    runs, other = computed(rig, 9, 5)
    numbers: list[int] = []

    def act() -> None:
        (first, *behind), begun = rig.plan_beside(ops=[(OFFLOAD, runs), (OFFLOAD, other)])
        numbers.extend([first, *behind])
        assert begun == 0 and not rig.mover.under_way

    beside(rig, runs, act)
    assert [copy.job_id for copy in rig.mover.under_way] == ["job-1", "job-2"]
    rig.mover.end_all()
    rig.idle()
    assert rig.ended[numbers[0]].tokens == 10  # with the token of the iteration


def test_nothing_begins_before_what_an_earlier_plan_still_has_to_begin() -> None:
    rig = Rig()
    runs, other = computed(rig, 9, 5)
    numbers: list[int] = []

    def act() -> None:
        first, begun = rig.plan_beside(ops=[(OFFLOAD, runs), (OFFLOAD, other)])
        second, begun_too = rig.plan_beside(ops=[(RELEASE, other)])
        numbers.extend([*first, *second])
        assert (begun, begun_too) == (0, 0)

    beside(rig, runs, act)
    rig.mover.end_all()
    rig.idle()
    assert [rig.ended[number].status for number in numbers] == [OpStatus.OK] * 3
    assert not rig.mover.host.get("job-2")


def test_who_gets_a_row_with_an_earlier_plan_or_is_new_waits_too() -> None:
    rig = Rig()
    runs, other = computed(rig, 9, 5)

    def act() -> None:
        _, begun = rig.plan_beside([runs, other])
        assert begun == 0
        assert rig.plan_beside(ops=[(OFFLOAD, other)])[1] == 0
        new = rig.job(range(4))
        assert rig.plan_beside(ops=[(DROP_DEVICE, new)])[1] == 0

    beside(rig, runs, act)
    assert not rig.failed
