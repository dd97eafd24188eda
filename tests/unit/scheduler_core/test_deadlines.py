"""Jobs that cannot meet their deadline end at once, those that can never do."""

from __future__ import annotations

import random

import pytest

from fastserve.scheduler.core import (
    FinishReason,
    JobSpec,
    JobState,
    KvOpKind,
    RejectReason,
    Scheduler,
    SchedulerConfig,
    WorkerInfo,
)
from fastserve.scheduler.core.cost_model import CostModel, Work, chunk
from fastserve.scheduler.core.deadlines import least_seconds
from support.scheduler_rig import Rig
from support.worker_model import WorkerModel

ITERATION_S = 0.010


def warm_rig(policy: str = "fcfs", rows: int = 1) -> Rig:
    """Its cost model knows that a decode takes 10 ms, a chunk of 64 prompt tokens 94 ms."""
    rig = Rig(
        {"policy": policy},
        max_num_seqs=rows,
        max_num_batched_tokens=64,
        device_blocks=200,
        max_model_len=800,
    )
    cost = rig.scheduler.cost_model("w")
    for number in range(100):
        cost.observe(Work(0, 0, 1, 2 * number), ITERATION_S)
    assert cost.error < 1e-9 and cost.seconds(chunk(0, 64)) == pytest.approx(0.094)
    return rig


def test_a_deadline_that_cannot_be_met_is_refused_on_submission() -> None:
    rig = warm_rig()
    refused = rig.submit("a", max_tokens=100, min_tokens=100, deadline=rig.now + 0.4)
    assert refused is not None
    assert refused.reason is RejectReason.DEADLINE and "cannot be met" in refused.message
    # 100 tokens take a second; half of the estimate is believed.
    assert rig.submit("b", max_tokens=100, min_tokens=100, deadline=rig.now + 0.6) is None
    # Without min_tokens the first one may be the last.
    assert rig.submit("c", max_tokens=100, deadline=rig.now + 0.4) is None
    assert rig.submit("d", deadline=rig.now) is not None


def test_a_long_prompt_counts() -> None:
    rig = warm_rig()
    assert rig.submit("a", prompt=640, deadline=rig.now + 0.4) is not None  # 0.94 s at least
    assert rig.submit("b", prompt=640, deadline=rig.now + 0.6) is None
    assert rig.submit("c", prompt=64, deadline=rig.now + 0.06) is None


def test_a_job_that_waits_for_too_long_ends_before_its_deadline() -> None:
    rig = warm_rig()
    rig.submit("first", prompt=1, max_tokens=400)
    rig.run(1)
    start = rig.now
    assert rig.submit("late", prompt=1, max_tokens=80, min_tokens=80, deadline=start + 1.0) is None
    while not (ended := rig.scheduler.expire(rig.now)):
        rig.run(1)
    assert 0.5 < rig.now - start < 0.8  # 80 tokens need 0.8 s, of which half is believed
    assert [(end.job_id, end.reason) for end in ended] == [("late", FinishReason.DEADLINE)]
    assert "cannot be met" in ended[0].error
    assert rig.scheduler.job("late") is None and rig.job("first").state is JobState.RUNNING


def test_what_it_held_is_freed() -> None:
    rig = warm_rig("mlfq")
    rig.submit("long", prompt=60, max_tokens=200, min_tokens=200, deadline=rig.now + 1.5)
    rig.run(5)
    rig.submit("urgent", max_tokens=600, priority=-1)  # takes its only row for too long
    while not (ended := rig.scheduler.expire(rig.now)):
        rig.run(1)
    assert [end.job_id for end in ended] == ["long"]
    before = rig.worker.free_device
    rig.run(2)
    assert (KvOpKind.RELEASE, "long") in rig.ops and "long" not in rig.worker.held
    assert rig.worker.free_device >= before + 15


def test_a_job_that_gets_on_is_left_alone_until_its_end() -> None:
    rig = warm_rig()
    deadline = rig.now + 101 * ITERATION_S
    assert rig.submit("a", prompt=1, max_tokens=100, min_tokens=100, deadline=deadline) is None
    ended: list[str] = []
    while not ended:
        assert rig.scheduler.expire(rig.now) == []
        ended = rig.run(1)
    assert ended == ["a"] and rig.now <= deadline


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_model_that_is_off_by_ten_ends_no_job_that_would_make_it(factor: float) -> None:
    rig = Rig({"policy": "fcfs"}, max_num_seqs=2, device_blocks=200, max_model_len=800)
    group = rig.scheduler._groups["w"]
    group.cost = group.policy.cost = _Off(group.info, factor)
    numbers = random.Random(2)
    for number in range(25):
        tokens = numbers.randint(1, 60)
        deadline = rig.now + (tokens + 2) * ITERATION_S
        assert (
            rig.submit(f"j{number}", max_tokens=tokens, min_tokens=tokens, deadline=deadline)
            is None
        )
        ended: list[str] = []
        while not ended:
            assert rig.scheduler.expire(rig.now) == []
            ended = rig.run(1)
        assert rig.now <= deadline
    assert group.cost.samples > 500


class _Off(CostModel):
    """Never learns: predicts a multiple of what every iteration takes."""

    def __init__(self, info: WorkerInfo, factor: float) -> None:
        self._off = factor
        super().__init__(info.prefill_sample, info.decode_sample)

    def seconds(self, work: Work) -> float:
        return self._off * ITERATION_S


def test_a_model_that_has_seen_nothing_is_not_believed() -> None:
    rig = Rig()
    group = rig.scheduler._groups["w"]
    spec = JobSpec("a", range(40), 20, 0.0, min_tokens=20)
    assert least_seconds(group, spec) == 0.0
    group.cost.samples = 64
    assert least_seconds(group, spec) > 0.1


def test_without_a_worker_only_the_deadline_itself_counts() -> None:
    scheduler = Scheduler(SchedulerConfig())
    spec = JobSpec("a", range(40), 900, 0.0, deadline=5.0, min_tokens=900)
    scheduler.restore(spec, [1], level=0, attained=0.0, preemptions=0, now=0.0)
    assert scheduler.expire(4.9) == []
    (ended,) = scheduler.expire(5.0)
    assert ended.reason is FinishReason.DEADLINE and "has passed" in ended.error


def test_cancelled_jobs_are_not_ended_again() -> None:
    rig = warm_rig()
    rig.submit("a", deadline=rig.now + 0.5)
    rig.scheduler.cancel("a", rig.now)
    assert rig.scheduler.expire(rig.now + 1.0) == []


def test_a_host_copy_spares_the_prefill() -> None:
    rig = warm_rig()
    rig.submit("a", prompt=300, max_tokens=50)
    rig.run(6)
    job, group = rig.job("a"), rig.scheduler._groups["w"]
    assert isinstance(rig.worker, WorkerModel) and job.computed >= 300
    group.stop(job, rig.now)
    on_device = least_seconds(group, job.spec, job)
    job.host_tokens, job.computed = job.computed, 0
    assert least_seconds(group, job.spec, job) == on_device
    job.host_tokens = 0
    assert least_seconds(group, job.spec, job) > 3 * on_device


def test_the_least_time_by_hand() -> None:
    """Half of: what is left of the prefill in chunks of 64, then the certain output but for the
    token that comes with the prefill."""
    rig = warm_rig()
    group = rig.scheduler._groups["w"]

    def least(prompt: int, least_tokens: int, most: int = 100) -> float:
        return least_seconds(group, JobSpec("a", range(prompt), most, 0.0, min_tokens=least_tokens))

    def chunks(*sizes: int) -> float:
        starts = [64 * number for number in range(len(sizes))]
        return sum(map(group.cost.seconds, map(chunk, starts, sizes)))

    for expected, found in (
        (ITERATION_S, least(1, 0)),
        (ITERATION_S, least(1, 1)),
        (5 * ITERATION_S, least(1, 5)),
        (3 * ITERATION_S, least(1, 50, most=3)),
        (chunks(64), least(64, 0)),
        (chunks(64) + ITERATION_S, least(65, 0)),  # the last token goes as a decode does
        (chunks(64, 64, 2) + 4 * ITERATION_S, least(130, 5)),
    ):
        assert found == pytest.approx(expected / 2, rel=1e-6)
    rig.submit("j", prompt=64, max_tokens=40, min_tokens=20)
    job = rig.job("j")
    assert least_seconds(group, job.spec, job) == pytest.approx((0.094 + 0.19) / 2, rel=1e-3)
    rig.plan()  # it has a row: that iteration may be over at any moment
    assert least_seconds(group, job.spec, job) == pytest.approx(0.19 / 2, rel=1e-3)
    rig.run(5)
    assert len(job.output) == 5
    # 20 - 5, but for the one under way. Its prefill was faster than predicted: an error, which
    # takes its share of what is believed.
    decode_s = group.cost.seconds(Work(0, 0, 1, job.known_len))
    for error in (group.cost.error, 1.0):
        group.cost.error = error
        expected = 14 * decode_s / 2 / (1 + error)
        assert least_seconds(group, job.spec, job) == pytest.approx(expected, rel=1e-6)
