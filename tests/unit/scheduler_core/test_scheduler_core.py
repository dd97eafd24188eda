"""What the scheduler takes and refuses, what it makes of reports, and workers that come and go."""

from __future__ import annotations

import dataclasses

import pytest

from fastserve.scheduler.core import (
    CostSample,
    EventKind,
    FinishReason,
    Inventory,
    JobSpec,
    JobState,
    KvOpKind,
    KvState,
    ProtocolError,
    RejectReason,
    Report,
    RowResult,
    SampledToken,
    Scheduler,
    SchedulerConfig,
)
from support.scheduler_rig import Rig
from support.worker_model import WorkerModel, token_of, worker_info


def test_refusals() -> None:
    rig = Rig({"max_queued_jobs": 2}, device_blocks=8, max_model_len=40)
    cases = {
        RejectReason.INVALID: rig.submit("empty", prompt=0),
        RejectReason.TOO_LONG: rig.submit("long", prompt=30, max_tokens=3),
    }
    rig.submit("a")
    cases[RejectReason.ALREADY_EXISTS] = rig.submit("a")
    rig.submit("b")
    cases[RejectReason.QUEUE_FULL] = full = rig.submit("c")
    for reason, rejection in cases.items():
        assert rejection is not None and rejection.reason is reason and rejection.message
    assert full is not None and full.retry_after_s >= 1
    too_long = cases[RejectReason.TOO_LONG]
    assert too_long is not None and "32" in too_long.message  # 8 blocks of 4 tokens
    assert {job.job_id for job in rig.scheduler.jobs()} == {"a", "b"}


def test_without_a_worker_nothing_is_taken() -> None:
    scheduler = Scheduler(SchedulerConfig())
    rejection = scheduler.submit(JobSpec("a", (1,), 1, 0.0), 0.0)
    assert rejection is not None and rejection.reason is RejectReason.NO_WORKER


@pytest.mark.parametrize(
    "change",
    [
        {"lease": 0},
        {"levels": 0},
        {"quantum_ratio": 1.0},
        {"starvation_s": 0.0},
        {"promotion_share": 0.0},
        {"max_num_seqs": 0},
    ],
)
def test_options_out_of_range(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        SchedulerConfig(**change)  # type: ignore[arg-type]


def test_samples_that_measure_nothing() -> None:
    with pytest.raises(ValueError, match="decode_sample"):
        dataclasses.replace(worker_info(), decode_sample=CostSample(1, 1, 1, 0.0))


def test_a_deadline_ends_a_job() -> None:
    rig = Rig()
    rig.submit("a", deadline=5.0, max_tokens=30)
    rig.run(2)
    assert rig.scheduler.expire(4.9) == []
    (finished,) = rig.scheduler.expire(5.0)
    assert finished.reason is FinishReason.DEADLINE and finished.error
    rig.run(2)
    assert not rig.worker.held


# Reports


def report_of(rig: Rig, *sampled: SampledToken, iteration: int = 1, **more: object) -> Report:
    rows = [RowResult(token.job_id, 1, 4) for token in sampled]
    return Report(1, iteration, rows=rows, sampled=sampled, seconds=0.01, **more)  # type: ignore[arg-type]


def test_a_token_twice_is_dropped() -> None:
    rig = Rig()
    rig.submit("a")
    rig.plan()
    first = rig.scheduler.on_report("w", report_of(rig, SampledToken("a", 0, 5)), 0.01)
    again = rig.scheduler.on_report("w", report_of(rig, SampledToken("a", 0, 5), iteration=2), 0.02)
    assert [token for _, _, token, _ in first.tokens] == [5]
    assert again.tokens == [] and rig.job("a").output == [5]


def test_a_gap_fails_the_job_alone() -> None:
    rig = Rig()
    rig.submit("a")
    rig.submit("b")
    rig.plan()
    progress = rig.scheduler.on_report(
        "w", report_of(rig, SampledToken("a", 1, 5), SampledToken("b", 0, 6)), 0.01
    )
    (finished,) = progress.finished
    assert (finished.job_id, finished.reason) == ("a", FinishReason.FAILED)
    assert [job_id for job_id, _, _, _ in progress.tokens] == ["b"]


def test_a_job_that_fails_in_the_worker() -> None:
    rig = Rig()
    rig.submit("a")
    rig.plan()
    progress = rig.scheduler.on_report("w", Report(1, 1, failed=[("a", "not finite")]), 0.01)
    assert [(end.job_id, end.error) for end in progress.finished] == [("a", "not finite")]
    assert rig.scheduler.job("a") is None


def test_the_limit_ends_a_job_even_if_the_worker_forgets() -> None:
    rig = Rig()
    rig.submit("a", max_tokens=1)
    rig.plan()
    progress = rig.scheduler.on_report("w", report_of(rig, SampledToken("a", 0, 5)), 0.01)
    assert [end.reason for end in progress.finished] == [FinishReason.LENGTH]


def test_what_the_worker_cannot_have_seen() -> None:
    rig = Rig()
    rig.submit("a")
    rig.plan()
    with pytest.raises(ProtocolError, match="plan 7"):
        rig.scheduler.on_report("w", Report(7, 1), 0.0)
    with pytest.raises(ProtocolError, match="iteration 3"):
        rig.scheduler.on_report("w", Report(1, 3), 0.0)


def test_a_decode_is_not_charged_for_the_prefill_beside_it() -> None:
    rig = Rig(max_num_batched_tokens=64, device_blocks=64, max_model_len=200)
    rig.submit("decode", max_tokens=30)
    rig.run(1)
    before = rig.job("decode").attained
    rig.submit("prompt", prompt=40)
    rig.plan()
    report = rig.worker.step(seconds=0.100)
    assert report is not None and len(report.rows) == 2
    rig.scheduler.on_report("w", report, rig.now)
    assert rig.job("decode").attained - before < 0.050
    assert rig.job("prompt").attained > 0.090


# Workers and leaders


def test_a_worker_that_comes_back_goes_on_from_what_it_holds() -> None:
    rig = Rig(device_blocks=32)
    rig.submit("a", prompt=10, max_tokens=12)
    rig.run(4)
    done = list(rig.job("a").output)
    rig.scheduler.remove_worker("w", rig.now)
    assert rig.job("a").state is JobState.PREEMPTED
    inventory = rig.worker.reconnect(died=False)
    assert rig.scheduler.add_worker(rig.info, inventory, rig.now) == []
    assert rig.job("a").kv is KvState.DEVICE and rig.job("a").computed == 10 + len(done) - 1
    job = rig.job("a")
    assert rig.run(20) == ["a"]
    assert job.output == [token_of("a", index) for index in range(12)]
    assert rig.scheduler.counters["tokens.recomputed"] == 0


def test_what_an_unknown_worker_holds_is_released() -> None:
    scheduler = Scheduler(SchedulerConfig())
    info = worker_info()
    unknown = scheduler.add_worker(info, Inventory({"old": 9}, {"old": 8, "older": 4}), 0.0)
    assert sorted(unknown) == ["old", "older"]
    plan = scheduler.plan("w", 0.0)
    assert plan is not None
    assert [(op.kind, op.job_id) for op in plan.ops] == [
        (KvOpKind.RELEASE, "old"),
        (KvOpKind.RELEASE, "older"),
    ]
    scheduler.check_integrity()


def test_a_worker_cannot_hold_more_than_it_has() -> None:
    scheduler = Scheduler(SchedulerConfig())
    with pytest.raises(ProtocolError, match="more blocks"):
        scheduler.add_worker(worker_info(device_blocks=2), Inventory({"x": 100}), 0.0)
    assert scheduler.submit(JobSpec("a", (1,), 1, 0.0), 0.0) is not None  # it is not there


def test_jobs_of_a_lost_worker_go_to_another() -> None:
    rig = Rig()
    rig.submit("a", max_tokens=12)
    rig.run(3)
    other = WorkerModel(worker_info("other"), rig.lengths, rig.scheduler.job)
    rig.scheduler.add_worker(other.info, Inventory(), rig.now)
    rig.scheduler.remove_worker("w", rig.now)
    job = rig.job("a")
    assert job.worker_id == "other"
    for _ in range(20):
        plan = rig.scheduler.plan("other", rig.now)
        if plan is not None:
            other.receive(plan)
        report = other.step()
        if report is not None:
            rig.scheduler.on_report("other", report, rig.now)
    assert job.state is JobState.FINISHED
    assert job.output == [token_of("a", index) for index in range(12)]


def test_new_jobs_go_where_the_fewest_are() -> None:
    rig = Rig()
    rig.scheduler.add_worker(worker_info("x"), Inventory(), 0.0)
    for name in "abcd":
        rig.submit(name)
    homes = [rig.job(name).worker_id for name in "abcd"]
    assert sorted(filter(None, homes)) == ["w", "w", "x", "x"]


def test_a_new_leader_goes_on_where_the_old_one_was() -> None:
    scheduler = Scheduler(SchedulerConfig())
    spec = JobSpec("a", tuple(range(6)), 10, 0.0)
    tokens = [token_of("a", index) for index in range(4)]
    scheduler.restore(spec, tokens, level=3, attained=0.5, preemptions=2, now=1.0)
    job = scheduler.job("a")
    assert job is not None and job.state is JobState.PREEMPTED
    assert (job.level, job.attained, job.preemptions) == (3, 0.5, 2)
    worker = WorkerModel(worker_info(), {"a": 10}, scheduler.job)
    scheduler.add_worker(worker.info, Inventory(), 1.0)
    for _ in range(20):
        plan = scheduler.plan("w", 1.0)
        if plan is not None:
            worker.receive(plan)
        report = worker.step()
        if report is not None:
            scheduler.on_report("w", report, 1.0)
    assert job.output == [token_of("a", index) for index in range(10)]


def test_events_tell_the_life_of_a_job() -> None:
    rig = Rig(max_num_seqs=1)
    rig.submit("long", max_tokens=12)
    rig.run(5)
    rig.submit("short", max_tokens=1)
    rig.run(20)
    kinds = [event.kind for event in rig.scheduler.drain_events() if event.job_id == "long"]
    shown = [kind for kind in kinds if kind is not EventKind.DEMOTED]
    assert shown == [
        EventKind.QUEUED,
        EventKind.STARTED,
        EventKind.PREEMPTED,
        EventKind.STARTED,
        EventKind.FINISHED,
    ]
    assert EventKind.DEMOTED in kinds
    assert rig.scheduler.drain_events() == []


def test_levels_are_counted() -> None:
    rig = Rig(max_num_seqs=1)
    for name in "abc":
        rig.submit(name)
    rig.run(1)
    assert sum(rig.scheduler.level_depths()) == 2
    quanta = rig.scheduler.level_quanta()
    assert len(quanta) == len(rig.scheduler.level_depths()) == 10
    assert quanta[3] == pytest.approx(8 * quanta[0])


def test_a_row_that_could_not_run_is_no_work() -> None:
    rig = Rig()
    rig.submit("a")
    rig.plan()
    report = Report(plan_id=1, iteration=1, rows=[RowResult("a", 0, 0)], seconds=0.01)
    rig.scheduler.on_report("w", report, 0.01)
    job = rig.job("a")
    assert job.computed == 0
    assert job.attained == pytest.approx(0.01)
