"""Levels, quanta, demotion, promotion and charges."""

from __future__ import annotations

import itertools

import pytest

from fastserve.scheduler.core import (
    CostSample,
    Inventory,
    Job,
    JobSpec,
    JobState,
    Scheduler,
    SchedulerConfig,
    UnknownPolicyError,
)
from fastserve.scheduler.core.cost_model import CostModel, Work
from fastserve.scheduler.core.policies import POLICIES, Policy
from fastserve.scheduler.core.policies.fastserve import FastServe
from fastserve.scheduler.core.policies.fcfs import Fcfs
from fastserve.scheduler.core.policies.fixed_priority import FixedPriority
from fastserve.scheduler.core.policies.hrrn import Hrrn
from fastserve.scheduler.core.policies.mlfq import Mlfq, SkipJoinMlfq
from fastserve.scheduler.core.policies.srpt import Srpt
from support.worker_model import worker_info

DECODE_S, TOKEN_S = 0.010, 0.002  # q1, and what a prompt token adds
PREFILL = CostSample(1, 101, 101, DECODE_S + 100 * TOKEN_S)
DECODE = CostSample(1, 1, 100, DECODE_S)


def policy_of(kind: type[Policy], **config: float) -> Policy:
    values = SchedulerConfig(policy=kind.name, **config)  # type: ignore[arg-type]
    cost = CostModel(PREFILL, DECODE)
    places = itertools.count(1000)
    return kind(values, cost, rows=8, budget=512, place=lambda: next(places))


def job_of(
    number: int,
    prompt: int = 1,
    priority: int = 0,
    arrival: float = 0.0,
    max_tokens: int = 50,
    service_class: str = "default",
) -> Job:
    spec = JobSpec(
        f"j{number}",
        range(prompt),
        max_tokens,
        arrival,
        priority=priority,
        service_class=service_class,
    )
    return Job(spec, number, arrival)


def charge(policy: Policy, job: Job, seconds: float) -> bool:
    """As the reader of reports does. True if the job sank."""
    job.used += seconds
    if job.used < policy.limits()[job.level]:
        return False
    policy.sink(job)
    return True


def joined(policy: Policy, *jobs: Job) -> list[Job]:
    for job in jobs:
        policy.join(job)
        policy.admit(job)
    return list(jobs)


def order(policy: Policy, jobs: list[Job]) -> list[str]:
    return [job.job_id for job in sorted(jobs, key=policy.key)]


def test_skip_join_goes_by_the_time_of_the_prefill() -> None:
    policy = policy_of(SkipJoinMlfq)
    levels = [joined(policy, job_of(0, prompt))[0].level for prompt in (1, 6, 7, 16, 100, 500)]
    # Quanta are 10, 20, 40, 80 ... ms; prefills take 10, 20, 22, 40, 208 and 1008 ms.
    assert levels == [0, 1, 2, 2, 5, 7]


def test_naive_mlfq_begins_at_the_top() -> None:
    assert joined(policy_of(Mlfq), job_of(0, 500))[0].level == 0


def test_the_last_level_takes_what_no_level_holds() -> None:
    policy = policy_of(SkipJoinMlfq, levels=3)
    (job,) = joined(policy, job_of(0, 500))
    assert job.level == 2
    assert charge(policy, job, 5.0) and job.level == 2


def test_a_used_quantum_costs_a_level_and_the_place() -> None:
    policy = policy_of(Mlfq)
    first, second = joined(policy, job_of(0), job_of(1))
    assert not charge(policy, first, DECODE_S / 2)
    assert charge(policy, first, DECODE_S / 2)
    assert charge(policy, second, DECODE_S)
    assert (first.level, second.level) == (1, 1)
    assert order(policy, [second, first]) == ["j0", "j1"]  # who sank later is behind


def test_a_job_sinks_as_far_as_its_use_calls_for_and_the_rest_counts() -> None:
    policy = policy_of(Mlfq)
    (job,) = joined(policy, job_of(0))
    assert charge(policy, job, DECODE_S * (1 + 2 + 4 + 3))
    assert job.level == 3
    assert job.used == pytest.approx(3 * DECODE_S)


def test_order_priority_then_level_then_row_then_place() -> None:
    policy = policy_of(Mlfq)
    a, b, c, d = joined(policy, job_of(0), job_of(1), job_of(2, priority=-1), job_of(3))
    charge(policy, a, DECODE_S)
    charge(policy, c, 100 * DECODE_S)
    d.state = JobState.RUNNING
    assert order(policy, [a, b, c, d]) == ["j2", "j3", "j1", "j0"]


def test_who_starves_comes_first_with_a_fresh_quantum() -> None:
    policy = policy_of(Mlfq, starvation_s=1.0)
    sunk, fresh = joined(policy, job_of(0), job_of(1))
    charge(policy, sunk, 40 * DECODE_S)
    assert not policy.promote(sunk, 0.9)
    assert policy.promote(sunk, 1.0)
    assert order(policy, [fresh, sunk]) == ["j0", "j1"]
    assert (sunk.level, sunk.used) == (0, 0.0)
    assert charge(policy, sunk, DECODE_S)  # and it sinks again
    assert order(policy, [fresh, sunk]) == ["j1", "j0"]


def test_promotions_never_take_more_than_their_share() -> None:
    policy = policy_of(Mlfq, starvation_s=1.0, promotion_share=0.25)  # 2 of 8 rows
    jobs = joined(policy, *(job_of(number) for number in range(4)))
    assert [policy.promote(job, 2.0) for job in jobs] == [True, True, False, False]
    policy.leave(jobs[0])  # one ends
    assert policy.promote(jobs[2], 2.0)


def test_fcfs_goes_by_arrival_and_never_takes_a_row_away() -> None:
    policy = policy_of(Fcfs)
    old, new, urgent = joined(policy, job_of(0), job_of(1), job_of(2, priority=-5))
    assert order(policy, [urgent, new, old]) == ["j0", "j1", "j2"]
    new.state = JobState.RUNNING
    assert order(policy, [urgent, new, old]) == ["j1", "j0", "j2"]
    assert not policy.preemptive and not charge(policy, new, 100.0)
    assert not policy.promote(old, 1e9)


def test_fixed_priority_goes_by_prompt_whatever_was_used() -> None:
    policy = policy_of(FixedPriority)
    long, short, urgent = joined(policy, job_of(0, 9), job_of(1, 3), job_of(2, 99, priority=-1))
    assert not charge(policy, short, 100.0)
    assert order(policy, [long, short, urgent]) == ["j2", "j1", "j0"]
    assert policy.promote(long, 1e9)
    assert order(policy, [long, short, urgent]) == ["j0", "j2", "j1"]


def test_hrrn_lets_short_ones_pass_until_long_ones_waited_enough() -> None:
    policy = policy_of(Hrrn)
    # Prefills of 208 and 20 ms.
    long, short = joined(policy, job_of(0, 100), job_of(1, 6, arrival=1.0))
    assert policy.resort(1.05)
    assert order(policy, [short, long]) == ["j0", "j1"]  # 1.05 / 0.208 > 0.05 / 0.02
    assert not policy.resort(1.1)  # not at every plan
    assert policy.resort(2.0)
    assert order(policy, [long, short]) == ["j1", "j0"]  # 2 / 0.208 < 1 / 0.02
    long.state = JobState.RUNNING
    assert order(policy, [long, short]) == ["j0", "j1"]


def test_srpt_goes_by_what_is_left() -> None:
    policy = policy_of(Srpt)
    long, short, prompt = joined(
        policy, job_of(0, max_tokens=40), job_of(1, max_tokens=30), job_of(2, 100, max_tokens=15)
    )
    assert order(policy, [long, short, prompt]) == ["j1", "j2", "j0"]  # a prefill of 21 decodes
    long.output.extend(range(20))
    assert charge(policy, long, DECODE_S)
    prompt.output.append(0)
    assert charge(policy, prompt, DECODE_S)
    assert order(policy, [long, short, prompt]) == ["j2", "j0", "j1"]


SERVICE_S = 256 * DECODE_S  # what fastserve takes for an average job until some have ended


def test_in_fastserve_a_newcomer_comes_first_until_its_first_quantum_is_used() -> None:
    policy = policy_of(FastServe)
    old, late = joined(policy, job_of(0), job_of(1, arrival=50.0))
    charge(policy, old, DECODE_S)
    assert order(policy, [old, late]) == ["j1", "j0"]
    charge(policy, late, DECODE_S)
    assert order(policy, [old, late]) == ["j0", "j1"]


def test_in_fastserve_short_prompts_come_first_among_newcomers() -> None:
    policy = policy_of(FastServe)
    long, short = joined(policy, job_of(0, 500), job_of(1, arrival=SERVICE_S))
    assert order(policy, [long, short]) == ["j1", "j0"]
    (much_later,) = joined(policy, job_of(2, arrival=10 * SERVICE_S))
    assert order(policy, [long, much_later]) == ["j0", "j2"], "but not for ever"


def begun(policy: Policy, number: int, arrival: float, quanta: int) -> Job:
    """A job that has used up so many quanta of the first level."""
    (job,) = joined(policy, job_of(number, arrival=arrival))
    charge(policy, job, quanta * DECODE_S)
    return job


def test_in_fastserve_a_level_is_a_handicap_in_time() -> None:
    policy = policy_of(FastServe)
    old = begun(policy, 0, 0.0, quanta=7)  # 1 + 2 + 4: three levels down
    soon = begun(policy, 1, 1.9 * SERVICE_S, quanta=1)
    late = begun(policy, 2, 2.1 * SERVICE_S, quanta=1)
    assert (old.level, soon.level, late.level) == (3, 1, 1)
    assert order(policy, [old, soon, late]) == ["j1", "j0", "j2"]


def test_in_fastserve_the_handicap_follows_the_backlog() -> None:
    policy = policy_of(FastServe)
    old = begun(policy, 0, 0.0, quanta=1)
    late = begun(policy, 1, 10 * SERVICE_S, quanta=0)
    late.newcomer = False
    policy.weigh(0.0, 0, 8)  # nobody waits: less than at the start
    assert order(policy, [old, late]) == ["j0", "j1"]
    policy.weigh(0.1, 160, 8)  # a flood counts at once
    assert order(policy, [old, late]) == ["j1", "j0"]
    policy.weigh(1000.0, 0, 8)
    assert order(policy, [old, late]) == ["j0", "j1"]


def test_in_fastserve_a_backlog_counts_once_it_lasts() -> None:
    policy = policy_of(FastServe)
    old = begun(policy, 0, 0.0, quanta=1)
    late = begun(policy, 1, 3 * SERVICE_S, quanta=0)
    late.newcomer = False
    policy.weigh(0.0, 0, 8)
    policy.weigh(1.0, 8, 8)  # as many wait as run
    assert order(policy, [old, late]) == ["j0", "j1"]
    policy.weigh(300.0, 8, 8)
    assert order(policy, [old, late]) == ["j1", "j0"]


def test_in_fastserve_old_jobs_yield_sooner_where_few_run() -> None:
    policy = policy_of(FastServe)
    old = begun(policy, 0, 0.0, quanta=1)
    late = begun(policy, 1, 1.5 * SERVICE_S, quanta=0)
    late.newcomer = False
    policy.weigh(0.0, 0, 8)
    assert order(policy, [old, late]) == ["j0", "j1"]
    policy.weigh(0.1, 0, 1)
    assert order(policy, [old, late]) == ["j1", "j0"]


def test_in_fastserve_the_handicap_follows_what_jobs_take() -> None:
    policy = policy_of(FastServe)
    old = begun(policy, 0, 0.0, quanta=1)
    late = begun(policy, 1, 5 * SERVICE_S, quanta=0)
    late.newcomer = False
    policy.weigh(0.0, 0, 1)
    assert order(policy, [old, late]) == ["j0", "j1"]
    for number in range(2, 300):
        (ended,) = joined(policy, job_of(number))
        ended.attained = 20 * SERVICE_S
        policy.leave(ended)
        policy.ended(ended)
    policy.weigh(0.1, 0, 1)
    assert order(policy, [old, late]) == ["j1", "j0"]


def test_in_fastserve_chunks_of_prompts_grow_with_those_who_wait() -> None:
    policy = policy_of(FastServe)
    rows, tokens = policy.size(0)
    # A prompt token takes 2 ms, seven decodes 70 ms: some 35 tokens, less what an iteration costs.
    assert (rows, tokens) == (8, 8 + 64), "64 at least"
    assert policy.size(200)[1] > policy.size(100)[1] > tokens
    assert policy.size(10_000) == (8, 512), "at most the budget"


def test_in_fastserve_rows_that_add_no_throughput_are_left_out() -> None:
    def rows_of(decode_of_64_s: float) -> int:
        policy = FastServe(
            SchedulerConfig(policy="fastserve"),
            CostModel(PREFILL, DECODE),
            rows=256,
            budget=512,
            place=lambda: 0,
        )
        per_row = (decode_of_64_s - DECODE_S) / 63
        for rows in (1, 64, 8, 200, 32, 128) * 50:
            work = Work(0, 0, rows, rows * 100)
            policy.cost.observe(work, DECODE_S + per_row * (rows - 1))
        return policy.size(0)[0]

    assert rows_of(DECODE_S * 1.5) == 256, "64 rows in the time of 1.5"
    # Each row takes half as long as the first: forty have all the throughput but a twentieth.
    assert 16 <= rows_of(DECODE_S * 32) < 64
    assert rows_of(DECODE_S * 640) == 16, "never fewer than that"


@pytest.mark.parametrize("kind", [FastServe, SkipJoinMlfq, Mlfq, FixedPriority, Srpt])
def test_classes_come_in_order(kind: type[Policy]) -> None:
    policy = policy_of(kind)
    classes = ("batch", "default", "interactive", "of another deployment")
    jobs = joined(policy, *(job_of(n, service_class=name) for n, name in enumerate(classes)))
    assert order(policy, jobs) == ["j2", "j1", "j3", "j0"]


def test_in_fastserve_a_batch_job_waits_for_a_bounded_time() -> None:
    policy = policy_of(FastServe)
    old, late = joined(
        policy,
        job_of(0, service_class="batch"),
        job_of(1, service_class="interactive", arrival=11 * 256 * DECODE_S),
    )
    assert order(policy, [late, old]) == ["j0", "j1"]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_orders_a_restored_job(name: str) -> None:
    scheduler = Scheduler(SchedulerConfig(policy=name))
    spec = JobSpec("j", range(5), 9, 0.0)
    scheduler.restore(spec, [7, 8], level=2, attained=0.1, preemptions=1, now=0.0)
    scheduler.add_worker(worker_info(), Inventory(), 0.0)
    plan = scheduler.plan("w", 0.0)
    assert plan is not None and [row.job.job_id for row in plan.rows] == ["j"]
    scheduler.check_integrity()


def test_unknown_policies_are_refused_with_those_that_exist() -> None:
    with pytest.raises(UnknownPolicyError, match="fastserve, skip-join-mlfq, mlfq, fcfs"):
        Scheduler(SchedulerConfig(policy="lottery"))
