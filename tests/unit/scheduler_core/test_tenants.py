"""Tenants of one class share service by weight; nobody pays for it who is alone."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from fastserve.scheduler.core import Job, JobSpec, JobState, KvOpKind, KvState
from fastserve.scheduler.core.fair_queue import FairQueue
from fastserve.scheduler.core.policies import POLICIES
from support.scheduler_rig import Rig

FAIR = sorted(name for name, policy in POLICIES.items() if policy.fair)


def rig_of(policy: str = "skip-join-mlfq", rows: int = 16, **config: Any) -> Rig:
    """Memory and tokens for everyone: rows are what is shared. An iteration takes 10 ms."""
    return Rig(
        {"policy": policy, "max_queued_jobs": 10_000, "max_partial_prefills": 100, **config},
        max_num_seqs=rows,
        max_num_batched_tokens=1024,
        device_blocks=20_000,
        max_model_len=20_000,
    )


def flood(rig: Rig, tenant: str, jobs: int, **spec: Any) -> None:
    """Jobs that outlast the test."""
    for number in range(jobs):
        assert rig.submit(f"{tenant}{number}", max_tokens=10_000, tenant=tenant, **spec) is None


def rows_of(rig: Rig) -> Counter[str]:
    """Rows by tenant."""
    running = [job for job in rig.scheduler.jobs() if job.state is JobState.RUNNING]
    return Counter(job.spec.tenant for job in running)


def attained(rig: Rig, tenant: str) -> float:
    return sum(job.attained for job in rig.scheduler.jobs() if job.spec.tenant == tenant)


def test_the_policies_that_share() -> None:
    assert FAIR == ["fastserve", "fixed-priority", "mlfq", "skip-join-mlfq"]


@pytest.mark.parametrize("policy", FAIR)
def test_equal_tenants_share_the_rows_whoever_came_first_with_how_many(policy: str) -> None:
    """llm-d-router #1182: by service had, not by requests."""
    rig = rig_of(policy)
    flood(rig, "a", 100)
    rig.run(20)
    flood(rig, "b", 20)
    rig.run(1)
    assert rows_of(rig) == {"a": 8, "b": 8}
    before = attained(rig, "a"), attained(rig, "b")
    rig.run(150)
    a, b = (attained(rig, name) - start for name, start in zip("ab", before, strict=True))
    assert abs(a - b) <= 1.0 and a + b == pytest.approx(24.0, rel=0.05)


@pytest.mark.parametrize("policy", FAIR)
def test_service_goes_by_weight(policy: str) -> None:
    rig = rig_of(policy)
    flood(rig, "a", 40, tenant_weight=3.0)
    flood(rig, "b", 40)
    rig.run(1)
    assert rows_of(rig) == {"a": 12, "b": 4}
    rig.run(200)
    assert attained(rig, "a") / attained(rig, "b") == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("policy", FAIR)
def test_switched_off_the_policy_alone_decides(policy: str) -> None:
    rig = rig_of(policy, fair_sharing=False)
    flood(rig, "a", 100)
    flood(rig, "b", 20)
    rig.run(1)
    assert rows_of(rig) == {"a": 16}


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - set(FAIR)))
def test_baselines_share_nothing(policy: str) -> None:
    rig = rig_of(policy)
    flood(rig, "a", 100)
    flood(rig, "b", 20)
    rig.run(1)
    assert rows_of(rig) == {"a": 16}


def test_a_light_tenant_gets_a_row_at_once_in_a_flood() -> None:
    rig = rig_of("fixed-priority")
    flood(rig, "heavy", 200)
    rig.run(50)
    assert rig.submit("light", prompt=500, tenant="light") is None  # the last one of all by prompt
    rig.plan()
    assert rig.job("light").state is JobState.RUNNING


def test_one_row_of_three_changes_hands_now_and_then_not_at_every_plan() -> None:
    rig = rig_of("fixed-priority", rows=3)
    flood(rig, "a", 10)
    flood(rig, "b", 10)
    rig.run(1000)  # 10 s, 30 s of service
    assert abs(attained(rig, "a") - attained(rig, "b")) <= 1.5
    preemptions = sum(job.preemptions for job in rig.scheduler.jobs())
    assert 5 <= preemptions <= 20


def test_spare_capacity_that_was_used_is_not_punished() -> None:
    rig = rig_of()
    flood(rig, "a", 30)
    flood(rig, "b", 1)
    rig.run(300)
    assert rows_of(rig) == {"a": 15, "b": 1}
    for number in range(30):
        rig.submit(f"more{number}", max_tokens=10_000, tenant="b")
    rig.run(2)
    assert rows_of(rig) == {"a": 8, "b": 8}, "b saved up what it did not want"


def test_a_tenant_that_comes_back_begins_where_the_others_are() -> None:
    rig = rig_of(rows=4)
    flood(rig, "a", 10)
    flood(rig, "b", 10)
    rig.run(100)
    for number in range(10):
        rig.scheduler.cancel(f"b{number}", rig.now)
    rig.run(500)
    flood(rig, "b", 10)
    rig.run(1)
    assert rows_of(rig) == {"a": 2, "b": 2}


def test_many_tenants_take_turns() -> None:
    rig = rig_of("fixed-priority", rows=2)
    for number in range(6):
        flood(rig, f"t{number}-", 2)
    rig.run(1200)
    service = [attained(rig, f"t{number}-") for number in range(6)]
    assert max(service) - min(service) <= 1.6
    assert sum(service) == pytest.approx(24.0, rel=0.05)


def test_short_jobs_count_though_they_are_over_before_the_next_plan() -> None:
    """One tenant sends long jobs, the other as many short ones as fit."""
    rig = rig_of("fixed-priority", rows=2)
    flood(rig, "long", 5)
    served, number = 0.0, 0
    for _ in range(1500):
        while sum(job.spec.tenant == "short" for job in rig.scheduler.jobs()) < 5:
            number += 1
            rig.submit(f"s{number}", prompt=1, max_tokens=3, tenant="short")
        served += 3 * len([job_id for job_id in rig.run() if job_id[0] == "s"]) * 0.010
    assert attained(rig, "long") == pytest.approx(served, rel=0.15)


@pytest.mark.parametrize("policy", ["fixed-priority", "mlfq", "skip-join-mlfq"])
def test_a_class_comes_before_shares(policy: str) -> None:
    rig = rig_of(policy)
    flood(rig, "a", 20, service_class="interactive")
    flood(rig, "b", 20, service_class="batch")
    rig.run(50)
    assert rows_of(rig) == {"a": 16}


def test_in_fastserve_a_class_is_a_head_start_between_tenants_too() -> None:
    rig = rig_of("fastserve", rows=2)
    flood(rig, "batch", 4, service_class="batch")
    rig.now = 0.5
    flood(rig, "chat", 4, service_class="interactive")
    rig.run(1)
    assert rows_of(rig) == {"chat": 2}
    rig = rig_of("fastserve", rows=2)
    flood(rig, "batch", 4, service_class="batch")
    rig.now = 1e5  # the head start is used up
    flood(rig, "chat", 4, service_class="interactive")
    rig.run(1)
    assert rows_of(rig) == {"batch": 2}


def test_priority_orders_the_jobs_of_a_tenant_and_takes_nothing_from_others() -> None:
    rig = rig_of(rows=4)
    flood(rig, "a", 10)
    rig.submit("a-urgent", max_tokens=10_000, tenant="a", priority=-1)
    flood(rig, "b", 10, priority=-9)
    rig.run(1)
    assert rows_of(rig) == {"a": 2, "b": 2}
    assert rig.job("a-urgent").state is JobState.RUNNING


def test_who_starves_comes_first_of_its_tenant() -> None:
    rig = rig_of("fixed-priority", rows=4, starvation_s=2.0)
    flood(rig, "a", 10)
    rig.submit("a-long", prompt=500, max_tokens=10_000, tenant="a")
    flood(rig, "b", 10)
    rig.run(190)
    assert not rig.job("a-long").boosted
    rig.run(20)
    lifted = [job.job_id for job in rig.scheduler.jobs() if job.boosted]
    assert len(lifted) == 1  # a quarter of the rows
    assert rig.job(lifted[0]).state is JobState.RUNNING


def test_who_starves_in_a_lower_class_comes_before_the_higher_ones() -> None:
    """In its class another tenant is served less and goes first; then it is its turn."""
    rig = rig_of("fixed-priority", rows=4, starvation_s=0.5)
    flood(rig, "a", 2, service_class="batch")
    rig.run(100)
    rig.submit("b", prompt=500, tenant="b", max_tokens=10_000, service_class="batch")
    flood(rig, "chat", 20, service_class="interactive")
    rig.run(1)
    assert rows_of(rig) == {"chat": 4}
    rig.run(150)
    assert sum(job.attained for job in rig.scheduler.jobs() if job.spec.tenant == "b") > 0


def test_promotions_give_a_flood_no_more_than_its_share() -> None:
    """Nearly all of its jobs starve; with every promoted one before the rest it had it all."""
    rig = rig_of("fixed-priority", rows=4, starvation_s=0.2, promotion_share=1.0)
    flood(rig, "a", 60)
    rig.run(100)
    flood(rig, "b", 10, prompt=500)
    start = attained(rig, "a")
    rig.run(200)
    assert attained(rig, "b") >= 0.8 * (attained(rig, "a") - start)


def test_memory_goes_by_the_same_order_as_rows() -> None:
    """The device is full of a's jobs, all of them before b's by key: one has to leave for b."""
    rig = Rig({"policy": "fixed-priority"}, max_num_seqs=4, device_blocks=16)
    for number in range(4):
        rig.submit(f"a{number}", prompt=12, max_tokens=40, length=8, tenant="a")
    rig.run(2)
    assert rig.scheduler._groups["w"].free < 6
    rig.submit("b", prompt=20, max_tokens=4, tenant="b")
    rig.run(2)
    left = [name for kind, name in rig.ops if kind in (KvOpKind.OFFLOAD, KvOpKind.DROP_DEVICE)]
    assert left and set(left) <= {"a1", "a2", "a3"}
    assert rig.job("b").kv is KvState.DEVICE
    assert sorted(rig.run(100)) == ["a0", "a1", "a2", "a3", "b"]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_one_tenant_is_served_the_same_with_and_without(policy: str) -> None:
    def plans(*, fair: bool) -> list[Any]:
        rig = Rig({"policy": policy, "fair_sharing": fair, "starvation_s": 0.3}, host_blocks=8)
        numbers, seen = random.Random(5), []
        for step in range(250):
            if numbers.random() < 0.3:
                service_class = numbers.choice(["interactive", "default", "batch"])
                priority = numbers.choice([0, 0, 1])
                rig.submit(
                    f"j{step}",
                    prompt=numbers.randint(1, 30),
                    max_tokens=numbers.randint(1, 20),
                    service_class=service_class,
                    priority=priority,
                )
            plan = rig.plan()
            if plan is not None:
                rows = [(row.job.job_id, row.tokens) for row in plan.rows]
                seen.append((plan.plan_id, rows, plan.ops))
            rig.worker.finish_copies()
            rig.step()
        return seen

    assert plans(fair=True) == plans(fair=False)


def test_a_weight_must_be_positive() -> None:
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="tenant_weight"):
            JobSpec("a", (1,), 1, 0.0, tenant_weight=weight)


def test_the_queue_against_one_that_looks_at_everything() -> None:
    """Random changes; the walk must be what a slow and simple rule gives, for every class."""
    numbers = random.Random(11)
    for _ in range(60):
        _compare(numbers)


def _compare(numbers: random.Random) -> None:
    queue = FairQueue(lambda job: (not job.boosted, job.limit, job.seq), fair=True)
    jobs: list[Job] = []
    for seq in range(60):
        if jobs and numbers.random() < 0.5:
            job = numbers.choice(jobs)
            match numbers.randrange(5):
                case 0:
                    queue.remove(job)
                    jobs.remove(job)
                case 1 if job.state is not JobState.RUNNING:
                    job.state = JobState.RUNNING
                    queue.start(job)
                case 2 if job.state is JobState.RUNNING:
                    job.state = JobState.PREEMPTED
                    queue.stop(job)
                case 3:
                    job.limit, job.boosted = numbers.random(), numbers.random() < 0.1
                    queue.update(job)
                case _:
                    queue.charge(job, numbers.random())
        else:
            spec = JobSpec(
                f"j{seq}",
                (1,),
                1,
                0.0,
                tenant=numbers.choice("abc"),
                tenant_weight=numbers.choice([0.5, 1.0, 2.0]),
                service_class=numbers.choice(["default", "default", "batch"]),
            )
            job = Job(spec, seq, 0.0)
            job.limit = numbers.random()
            queue.add(job)
            jobs.append(job)
        if numbers.random() < 0.3:
            queue.settle()
        queue.check()
        classes = [
            _slow_order([job for job in jobs if job.spec.service_class == name])
            for name in ("default", "batch")
        ]
        merged: list[Job] = []
        while any(classes):
            heads = [order for order in classes if order]
            merged.append(
                min(heads, key=lambda order: (not any(j.boosted for j in order), order[0].key)).pop(
                    0
                )
            )
        assert list(queue) == merged


def _slow_order(jobs: list[Job]) -> list[Job]:
    """Again and again: of the tenants' best jobs, that of the tenant with the least service."""
    service = {job.spec.tenant: job.lane.attained for job in jobs}
    left, order = sorted(jobs, key=lambda job: job.key), []
    while left:
        heads = {job.spec.tenant: job for job in reversed(left)}.values()
        alone = len({job.spec.tenant for job in jobs}) == 1
        best = min(
            heads,
            key=lambda job: (
                service[job.spec.tenant] + 0.5 * (job.state is not JobState.RUNNING),
                job.lane.number,
            ),
        )
        best = left[0] if alone else best
        order.append(best)
        left.remove(best)
        service[best.spec.tenant] += 1.0 / best.spec.tenant_weight
    return order
