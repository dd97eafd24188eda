"""The engine: iterations under a plan and its lease, ends, failures, streams."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.worker.job import OpKind
from fastserve.worker.model.sampling import SamplingParams
from unit.worker.engine_rig import BLOCK, CRASH, POISON, VOCAB, Rig, undisturbed

GREEDY: dict[str, Any] = {"temperature": 0.0}

# --- plans and leases ----------------------------------------------------------------------------


def test_chunked_prefill_goes_on_as_decode_under_one_lease() -> None:
    rig = Rig()
    long, short = rig.job(range(13)), rig.job([5, 6])
    done = rig.run({long: 5, short: 5}, 6)
    assert [iteration.rows for iteration in done] == [
        [(long, 5, 5), (short, 2, 2)],
        [(long, 5, 10), (short, 1, 3)],
        [(long, 3, 13), (short, 1, 4)],
        [(long, 1, 14), (short, 1, 5)],
        [(long, 1, 15), (short, 1, 6)],
        [(long, 1, 16), (short, 1, 7)],
    ]
    assert [iteration.iteration for iteration in done] == [1, 2, 3, 4, 5, 6]
    assert [iteration.context_tokens for iteration in done[:2]] == [7, 13]
    assert [len(rig.output[handle]) for handle in (long, short)] == [4, 6]
    rig.check_output()
    assert rig.engine.pool.free == 100 - 4 - 2


def test_the_lease_ends_and_state_is_kept() -> None:
    rig = Rig()
    job = rig.job(range(6))
    rig.run([job], 3)
    assert not rig.engine.runnable
    assert rig.engine.ended_report() is None
    rig.run([job], 4)
    assert len(rig.output[job]) == 6
    rig.check_output()


def test_a_newer_plan_takes_effect_at_the_next_boundary() -> None:
    rig = Rig()
    first = rig.job(range(6))
    rig.plan([first], lease=100)
    rig.step()
    second = rig.job(range(3))
    rig.plan([second], lease=2)
    assert [row[0] for row in rig.step().rows] == [second]
    assert [row[0] for row in rig.step().rows] == [second]
    assert not rig.engine.runnable
    rig.run([first, second], 5)
    rig.check_output()
    assert len(rig.output[first]) == 5 and len(rig.output[second]) == 7


def test_rows_without_a_lease_do_not_run() -> None:
    rig = Rig()
    rig.plan([rig.job([1])], lease=0)
    assert not rig.engine.runnable


def test_tokens_do_not_depend_on_batch_mates_or_chunks() -> None:
    outputs = []
    for mates, chunk in [(0, 20), (0, 1), (5, 3)]:
        rig = Rig()
        job = rig.job(range(11))
        others = [rig.job([i] * (i + 1)) for i in range(mates)]
        while len(rig.output[job]) < 8:
            rig.run({job: chunk, **dict.fromkeys(others, 2)}, 1)
        outputs.append(rig.output[job])
        rig.check_output()
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_job_that_comes_with_output_goes_on_behind_it() -> None:
    rig = Rig()
    params = SamplingParams(max_tokens=1000, seed=1)
    job = rig.job([7, 8, 9], output=undisturbed([7, 8, 9], params, 5))
    rig.run({job: 100}, 3)
    assert len(rig.output[job]) == 8
    rig.check_output()


# --- ends ----------------------------------------------------------------------------------------


def test_max_tokens_and_the_models_length() -> None:
    rig = Rig(max_model_len=10)
    few, many = rig.job([1, 2], max_tokens=3), rig.job([3, 4, 5])
    done = rig.run([few, many], 50)
    assert rig.finished == {few: "length", many: "length"}
    assert [len(rig.output[few]), len(rig.output[many])] == [3, 7]
    assert [len(iteration.rows) for iteration in done] == [2, 2, 2, 1, 1, 1, 1]
    assert not rig.engine.runnable  # all rows are over before the lease is
    rig.run([few, many], 1)
    assert not rig.failed and not rig.engine.runnable
    rig.check_output()


def expected_until(stop: int, prompt: list[int]) -> list[int]:
    output = undisturbed(prompt, SamplingParams(max_tokens=99, temperature=0.0), 60)
    return output[: output.index(stop) + 1]


def test_end_of_sequence_and_stop_tokens() -> None:
    prompt = [9, 9]
    end = undisturbed(prompt, SamplingParams(max_tokens=9, temperature=0.0), 6)[5]
    rig = Rig(eos=frozenset({end}))
    eos = rig.job(prompt, **GREEDY)
    ignoring = rig.job(prompt, ignore_eos=True, max_tokens=12, **GREEDY)
    rig.run([eos, ignoring], 50)
    assert rig.output[eos] == expected_until(end, prompt)
    assert rig.finished == {eos: "stop", ignoring: "length"}
    assert len(rig.output[ignoring]) == 12

    rig = Rig()
    stopping = rig.job(prompt, stop_token_ids=frozenset({end}), **GREEDY)
    rig.run([stopping], 50)
    assert rig.output[stopping] == expected_until(end, prompt)
    assert rig.finished == {stopping: "stop"}


def test_min_tokens_holds_the_end_back() -> None:
    end = undisturbed([9, 9], SamplingParams(max_tokens=9, temperature=0.0), 1)[0]
    rig = Rig(eos=frozenset({end}))
    job = rig.job([9, 9], min_tokens=4, max_tokens=30, **GREEDY)
    rig.run([job], 50)
    assert end not in rig.output[job][:4]
    assert len(rig.output[job]) > 4


# --- one bad job ---------------------------------------------------------------------------------


def test_bad_rows_and_operations_fail_alone() -> None:
    rig = Rig()
    good, zero, empty = rig.job(range(4)), rig.job([1]), rig.job([])
    rig.plan({good: 9, 77: 1, zero: 0, empty: 1}, ops=[(OpKind.OFFLOAD, 88)])
    rig.step()
    assert rig.failed == {
        77: "a row names an unknown job",
        zero: "a row with no tokens",
        empty: "a row for a job without tokens",
        88: "a KV operation names an unknown job",
    }
    assert len(rig.output[good]) == 1


def test_logits_that_are_not_finite_fail_their_job_alone() -> None:
    rig = Rig()
    good, bad = rig.job(range(4)), rig.job([1, POISON])
    done = rig.run([bad, good], 5)
    assert rig.failed == {bad: "the model's logits are not finite"}
    assert [row[0] for row in done[1].rows] == [good]
    assert len(rig.output[good]) == 5
    rig.do(OpKind.RELEASE, bad)
    assert rig.engine.pool.free == 100 - len(rig.engine._by_handle[good].blocks)
    rig.check_output()


def test_an_iteration_that_raises_fails_its_rows_and_no_others() -> None:
    rig = Rig()
    resting, bad, mate = rig.job(range(4)), rig.job([CRASH]), rig.job([2])
    rig.run([resting], 2)
    rig.run([bad, mate], 3)
    assert set(rig.failed) == {bad, mate}
    assert "device on fire" in rig.failed[bad]
    rig.run([resting], 2)
    assert len(rig.output[resting]) == 4
    rig.check_output()


@pytest.mark.parametrize(
    ("prompt", "params", "why"),
    [
        ([1, VOCAB], {}, f"token {VOCAB} is not in the vocabulary"),
        ([1], {"logit_bias": ((VOCAB, 1.0),)}, f"token {VOCAB} is not in the vocabulary"),
        (
            [1],
            {"stop_token_ids": frozenset({VOCAB}), "min_tokens": 2},
            f"token {VOCAB} is not in the vocabulary",
        ),
        ([1], {"logprobs": VOCAB + 1}, "more log-probabilities than tokens"),
        ([1] * 101, {}, "longer than the model's length of 100"),
    ],
    ids=["prompt", "bias", "stop", "logprobs", "length"],
)
def test_a_job_the_model_cannot_run_fails_alone(
    prompt: list[int], params: dict[str, Any], why: str
) -> None:
    rig = Rig(max_model_len=100)
    good = rig.job(range(4))
    bad = rig.job(prompt, **params)
    rig.run([good, bad], 3)
    assert list(rig.failed) == [bad]
    assert why in rig.failed[bad]
    assert len(rig.output[good]) == 3
    rig.do(OpKind.RELEASE, bad)
    assert rig.failed[bad] and rig.engine.pool.free == 100 - 2


# --- blocks --------------------------------------------------------------------------------------


def test_a_row_without_a_block_stalls_and_goes_on_later() -> None:
    rig = Rig(blocks=4)
    big, small = rig.job(range(3 * BLOCK - 1)), rig.job(range(BLOCK))
    rig.run({big: 50, small: 50}, 1)
    (iteration,) = rig.run([big, small], 1)
    assert iteration.stalled == [small] and [row[0] for row in iteration.rows] == [big]
    rig.do(OpKind.RELEASE, big)
    rig.run([small], 6)
    assert len(rig.output[small]) == 7
    rig.check_output()


def test_release_frees_everything_and_the_handle_is_dead() -> None:
    rig = Rig()
    job, other = rig.job(range(10)), rig.job(range(3))
    rig.run([job, other], 4)
    rig.do(OpKind.OFFLOAD, job)
    rig.do(OpKind.UPLOAD, job)
    rig.plan(ops=[(OpKind.RELEASE, job), (OpKind.RELEASE, other)])
    rig.mover.end_all()
    rig.idle()
    assert rig.engine.pool.free == 100
    assert not rig.mover.host
    assert not rig.engine._held and not rig.engine._by_handle
    rig.plan([job])
    rig.idle()
    assert rig.failed == {job: "a row names an unknown job"}


# --- streams -------------------------------------------------------------------------------------


def test_a_new_stream_takes_stock_and_work_goes_on() -> None:
    rig = Rig()
    device, host, both, gone, over = (
        rig.job([i, i + 1, i + 2], max_tokens=3 if i == 4 else 99) for i in range(5)
    )
    rig.run([device, host, both, gone, over], 5)
    for handle in (host, both):
        rig.do(OpKind.OFFLOAD, handle)
    rig.do(OpKind.UPLOAD, both)
    rig.do(OpKind.DROP_DEVICE, gone)
    rig.plan([device], lease=50)
    rig.engine.detach()
    assert not rig.engine.runnable
    rig.plan_id = 0
    assert rig.engine.reset(0, rig.mover.inventory) == {
        "job-1": (7, 0),
        "job-2": (0, 7),
        "job-3": (7, 7),
    }
    rig.check_blocks()
    live = (device, host, both, gone)
    for handle in live:
        rig.resend(handle)
    rig.plan(ops=[(OpKind.UPLOAD, host)])
    rig.mover.end_all()
    done = rig.run(live, 5)
    assert done[0].iteration == 1
    assert done[0].rows[:3] == [(device, 1, 8), (host, 1, 8), (both, 1, 8)]
    assert done[0].rows[3] == (gone, 5, 5)
    rig.check_output()
    rig.check_blocks()


def test_a_scheduler_that_knows_fewer_tokens_gets_the_same_ones_again() -> None:
    rig = Rig()
    job = rig.job(range(6))
    rig.run([job], 9)
    before = list(rig.output[job])
    assert rig.engine.pool.free == 100 - 4  # 13 tokens
    rig.engine.reset(rig.plan_id, {})
    rig.resend(job, known=2)
    rig.plan()
    assert rig.engine.pool.free == 100 - 2  # 7 tokens
    (iteration,) = rig.run([job], 1)
    assert iteration.rows == [(job, 1, 8)]  # KV of the common prefix is kept
    rig.run([job], 4)
    assert rig.output[job] == before[:7]
    rig.check_blocks()


def test_a_finished_job_can_be_sent_again() -> None:
    """Its last token may never have reached the scheduler."""
    rig = Rig()
    job = rig.job(range(6), max_tokens=4)
    rig.run([job], 50)
    before = list(rig.output[job])
    assert rig.engine.reset(rig.plan_id, {}) == {}
    assert rig.engine.pool.free == 100
    rig.resend(job, known=3)
    rig.run([job], 50)
    assert rig.output[job] == before and rig.finished == {job: "length"}


def test_a_job_with_other_tokens_keeps_no_kv_of_its_namesake() -> None:
    rig = Rig()
    job = rig.job(range(6))
    rig.run([job], 3)
    rig.engine.reset(rig.plan_id, {})
    rig.jobs[job].token_ids[:] = [9, 8, 7, 6, 5, 4]
    rig.output[job].clear()
    rig.resend(job)
    rig.run([job], 5)
    rig.check_output()


def test_host_kv_of_an_unknown_job_is_reported_and_can_be_released() -> None:
    rig = Rig()
    assert rig.engine.reset(0, {"job-1": 9}) == {"job-1": (0, 9)}
    job = rig.job([])
    rig.mover.host["job-1"] = {}
    rig.do(OpKind.RELEASE, job)
    assert not rig.mover.host and not rig.engine._held and not rig.failed
