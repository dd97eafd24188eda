"""Where jobs are placed, and how they move between worker groups."""

from __future__ import annotations

import pytest

from fastserve.scheduler.core import (
    EventKind,
    Inventory,
    JobSpec,
    JobState,
    KvState,
    RejectReason,
)
from support.worker_groups import Groups
from support.worker_model import WorkerModel, token_of, worker_info


def test_jobs_are_spread_by_what_groups_can_do() -> None:
    groups = Groups({"fast": 1.0, "slow": 0.1})
    for number in range(12):
        groups.submit(f"j{number}")
    # Ten times slower: even with four in each row of the fast one that is the sooner end.
    assert len(groups.at("slow")) <= 1


def test_a_group_without_room_for_the_kv_cache_counts_as_crowded() -> None:
    groups = Groups({"a": 1.0, "b": 1.0}, device_blocks=40)
    groups.submit("large", prompt=100, max_tokens=20)
    for number in range(4):
        groups.submit(f"j{number}", prompt=40, max_tokens=20)
    (full,) = {groups.scheduler.job("large").worker_id}  # type: ignore[union-attr]
    assert len(groups.at(str(full))) < 1 + 4 - len(groups.at(str(full)))


def test_a_long_queue_ahead_counts_by_the_order_of_the_policy() -> None:
    """A queue of batch jobs is no reason for an interactive one to go elsewhere."""
    groups = Groups({"a": 1.0, "b": 0.5}, {"policy": "skip-join-mlfq"})
    groups.scheduler.drain("b", True, 0.0)
    for number in range(20):
        groups.submit(f"j{number}", service_class="batch")
    groups.scheduler.drain("b", False, 0.0)
    groups.submit("now", service_class="interactive")
    groups.submit("later", service_class="batch")
    assert "now" in groups.at("a")
    assert "later" in groups.at("b")


def test_a_drained_group_gives_its_jobs_away_and_may_leave() -> None:
    groups = Groups({"a": 1.0, "b": 1.0})
    for number in range(8):
        groups.submit(f"j{number}")
    groups.step(10)
    assert len(groups.at("a")) == 4
    groups.scheduler.drain("a", True, groups.now)
    groups.step(6)
    assert groups.at("a") == set() and groups.models["a"].held == {}
    assert groups.scheduler.counters["migrations.drain"] == 4
    plan = groups.models["a"].plan
    assert plan is not None and plan.may_leave
    assert any(event.kind is EventKind.MIGRATED for event in groups.scheduler.drain_events())
    groups.run()
    assert all(len(tokens) == 60 for tokens in groups.tokens.values())


@pytest.mark.parametrize("running", [1, 4])
def test_the_pause_of_a_move_is_under_three_iterations(running: int) -> None:
    """From one token to the next, whatever the number of jobs that move with it."""
    groups = Groups({"a": 1.0, "b": 1.0}, max_num_seqs=16)
    for number in range(2 * running):
        groups.submit(f"j{number}", prompt=24, max_tokens=100)
    groups.step(20)
    movers = groups.at("a")
    assert len(movers) == running
    groups.scheduler.drain("a", True, groups.now)
    groups.run()
    assert max(groups.longest_pause(job) for job in movers) < 3


@pytest.mark.parametrize("policy", ["fcfs", "fastserve", "skip-join-mlfq"])
def test_newcomers_do_not_hold_up_a_job_that_is_computed_again(policy: str) -> None:
    """Its prompt takes five iterations; those of the newcomers come after it."""
    groups = Groups({"a": 1.0}, {"policy": policy}, max_num_seqs=16, device_blocks=512)
    groups.submit("mover", prompt=280, max_tokens=60)
    groups.step(20)
    groups.add("b")
    groups.scheduler.drain("a", True, groups.now)
    for number in range(2):
        groups.submit(f"long{number}", prompt=400, max_tokens=60)
    groups.run()
    assert groups.longest_pause("mover") < 7


def test_without_another_group_jobs_stay_and_newcomers_are_refused() -> None:
    groups = Groups({"a": 1.0})
    groups.submit("j")
    groups.step(3)
    groups.scheduler.drain("a", True, groups.now)
    rejection = groups.submit("k")
    assert rejection.reason is RejectReason.NO_WORKER
    groups.run()
    assert len(groups.tokens["j"]) == 60
    groups.step(2)
    plan = groups.models["a"].plan
    assert plan is not None and plan.may_leave


def test_jobs_that_lost_their_group_go_to_one_that_takes_jobs_again() -> None:
    groups = Groups({"a": 1.0, "b": 1.0})
    groups.scheduler.drain("b", True, groups.now)
    groups.submit("j")
    groups.models.pop("a")
    groups.scheduler.remove_worker("a", groups.now)
    groups.step(2)
    assert groups.at("b") == set()
    groups.scheduler.drain("b", False, groups.now)
    assert groups.at("b") == {"j"}
    groups.run()


def test_a_job_too_long_for_the_group_that_stays_ends_where_it_is() -> None:
    groups = Groups({"a": 1.0})
    small = worker_info("b", device_blocks=8, max_model_len=32)
    groups.models["b"] = WorkerModel(small, groups.lengths, groups.scheduler.job)
    groups.scheduler.add_worker(small, Inventory(), 0.0)
    groups.submit("long", prompt=50, max_tokens=60)
    groups.step(3)
    groups.scheduler.drain("a", True, groups.now)
    groups.step(3)
    assert groups.at("a") == {"long"}
    rejection = groups.submit("another", prompt=50, max_tokens=60)
    assert rejection.reason is RejectReason.NO_WORKER
    groups.run()


def test_a_worker_that_comes_back_gets_the_jobs_whose_kv_cache_it_has() -> None:
    """After a broken stream the other group has hardly begun to compute it again."""
    groups = Groups({"a": 1.0, "b": 1.0})
    for number in range(4):
        groups.submit(f"j{number}", prompt=60, max_tokens=80)
    groups.step(30)
    before = groups.at("a")
    assert len(before) == 2
    model = groups.models.pop("a")
    inventory = model.reconnect(died=False)
    groups.scheduler.remove_worker("a", groups.now)
    assert groups.at("b") == {"j0", "j1", "j2", "j3"}
    groups.models["a"] = model
    groups.scheduler.add_worker(model.info, inventory, groups.now)
    assert groups.at("a") == before
    recomputed = groups.scheduler.counters["tokens.recomputed"]
    groups.run()
    assert groups.scheduler.counters["tokens.recomputed"] - recomputed < 60


def test_what_a_group_was_to_drop_is_left_alone_once_it_is_elsewhere() -> None:
    """A worker comes back with more than fits; before it hears of that, the job goes away."""
    groups = Groups({})
    scheduler = groups.scheduler
    for name, known in (("large", 40), ("small", 29)):
        groups.lengths[name], groups.tokens[name], groups.came[name] = 20, [], []
        spec = JobSpec(name, tuple(range(known - 1)), 20, 0.0)
        scheduler.restore(spec, [token_of(name, 0)], level=0, attained=0.0, preemptions=0, now=0.0)
    a, b = worker_info("a", device_blocks=16), worker_info("b", device_blocks=32)
    scheduler.add_worker(a, Inventory({"large": 32, "small": 28}), 0.0)
    scheduler.add_worker(b, Inventory(), 0.0)
    scheduler.drain("a", True, 0.0)
    assert groups.at("a") == set()
    assert scheduler.plan("b", 0.1) is not None
    scheduler.plan("a", 0.1)
    scheduler.check_integrity()
    assert {job.kv for job in scheduler.jobs()} == {KvState.DEVICE}


def test_an_idle_group_takes_what_waits_elsewhere() -> None:
    groups = Groups({"a": 1.0, "b": 1.0}, {"policy": "fcfs"}, max_num_seqs=2)
    groups.scheduler.drain("b", True, 0.0)
    for number in range(8):
        groups.submit(f"j{number}")
    groups.step(2)
    assert groups.at("b") == set()
    groups.scheduler.drain("b", False, groups.now)
    groups.step(2)
    assert len(groups.at("b")) >= 3
    assert all(
        job.state is JobState.RUNNING or job.worker_id == "b" or len(groups.at("a")) <= 6
        for job in groups.scheduler.jobs()
    )
    groups.run()


def test_jobs_do_not_go_to_and_fro() -> None:
    groups = Groups({"a": 1.0, "b": 1.0}, max_num_seqs=2)
    for number in range(40):
        groups.submit(f"j{number}", max_tokens=30 + number)
    groups.run()
    assert groups.scheduler.counters["migrations.balance"] <= 40


def test_what_it_would_cost_to_end_a_group() -> None:
    groups = Groups({"a": 1.0, "b": 1.0})
    groups.submit("j", prompt=40, max_tokens=20)
    job = groups.scheduler.job("j")
    assert job is not None
    busy = str(job.worker_id)
    idle = "b" if busy == "a" else "a"
    groups.step(4)
    assert job.computed >= 40
    assert groups.scheduler.moving_cost(busy) == job.computed + 1
    assert groups.scheduler.moving_cost(idle) == 0
    groups.scheduler.drain(idle, True, groups.now)
    assert groups.scheduler.moving_cost(idle) == -1
    with pytest.raises(KeyError):
        groups.scheduler.moving_cost("nobody")
