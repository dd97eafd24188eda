"""KV caches that go ahead of their jobs: few tokens are computed again, nobody waits for it, and
whatever fails on the way, the job goes on and nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.scheduler.core import Job, JobState, KvOpKind, KvPlace, KvState, PreemptReason
from fastserve.scheduler.core.operations import Stage
from support.worker_groups import Groups

PROMPT = 100


def running(*, jobs: int = 4, steps: int = 20, policy: str = "fastserve", **worker: Any) -> Groups:
    """Two groups with half of the jobs each, all of which decode."""
    sizes = {"max_num_seqs": 8, **worker}
    groups = Groups({"a": 1.0, "b": 1.0}, {"policy": policy}, peers=True, **sizes)
    for number in range(jobs):
        groups.submit(f"j{number}", prompt=PROMPT, max_tokens=100)
    groups.step(steps)
    assert len(groups.at("a")) == jobs / 2
    assert all(job.state is JobState.RUNNING for job in groups.scheduler.jobs())
    return groups


def drain(groups: Groups, name: str = "a", *, draining: bool = True) -> None:
    groups.scheduler.drain(name, draining, groups.now)


def job_of(groups: Groups, name: str) -> Job:
    job = groups.scheduler.job(name)
    assert job is not None, f"{name} has ended"
    return job


def stages(groups: Groups) -> list[Stage]:
    return [job.migration.stage for job in groups.scheduler.jobs() if job.migration is not None]


def leave(groups: Groups, stage: Stage) -> str:
    """Drain a group with one job until its migration is so far; the job."""
    (mover,) = groups.at("a")
    groups.slow = {Stage.SENDING: {"a"}, Stage.COMING: {"b"}}.get(stage, set())
    drain(groups)
    for _ in range(10):
        if stages(groups) == [stage]:
            return mover
        groups.step()
    raise AssertionError(f"it is {stages(groups)}")


def pauses(groups: Groups) -> list[int]:
    """Of the jobs that moved while they decoded."""
    counters = groups.scheduler.counters
    names = [name for name in counters if name.startswith("pauses.")]
    return sorted(int(name.split(".")[1]) for name in names for _ in range(counters[name]))


def exports(groups: Groups) -> int:
    return sum(kind is KvOpKind.EXPORT for _, kind, _ in groups.ops)


def finish(groups: Groups) -> None:
    """All of it is right, and nothing stays behind."""
    groups.slow.clear()
    groups.run()
    assert all(len(tokens) == 100 for tokens in groups.tokens.values())
    groups.step(4)
    for model in groups.models.values():
        assert model.held == {} and model.imports == {}
        assert (model.free_device, model.free_host) == (
            model.info.device_blocks,
            model.info.host_blocks,
        )


@pytest.mark.parametrize("jobs", [2, 8])
def test_most_of_the_kv_goes_with_the_jobs(jobs: int) -> None:
    groups = running(jobs=jobs, host_blocks=512, device_blocks=512)
    movers = groups.at("a")
    drain(groups)
    groups.step(12)
    counters = groups.scheduler.counters
    assert groups.at("a") == set() and groups.models["a"].held == {}
    assert counters["exports.moved"] == counters["migrations.drain"] == len(movers)
    # The end of a block, and what was decoded while the rest was on its way.
    assert counters["tokens.recomputed"] < len(movers) * 10
    assert counters["tokens.export"] > len(movers) * PROMPT
    plan = groups.models["a"].plan
    assert plan is not None and plan.may_leave
    finish(groups)
    assert max(groups.longest_pause(job) for job in movers) < 3


def crowded(policy: str) -> Groups:
    """Iterations have time for all rows, and for the ends of the blocks of few jobs beside them."""
    sizes = {"block_size": 16, "max_num_seqs": 40, "host_blocks": 512, "device_blocks": 512}
    return running(jobs=32, steps=50, policy=policy, **sizes)


@pytest.mark.parametrize("policy", ["fcfs", "fastserve", "skip-join-mlfq"])
@pytest.mark.parametrize("newcomers", [0, 2])
def test_jobs_follow_their_kv_as_fast_as_they_can_go_on(policy: str, newcomers: int) -> None:
    """Whoever comes meanwhile with a long prompt leaves them the time."""
    groups = crowded(policy)
    drain(groups)
    for number in range(newcomers):
        groups.submit(f"long{number}", prompt=400, max_tokens=100)
    groups.step(30)
    assert groups.at("a") == set()
    assert groups.scheduler.counters["exports.moved"] == 16
    assert len(pauses(groups)) == 16 and max(pauses(groups)) < 2
    finish(groups)


def test_a_move_costs_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group that stays runs more at once than its policy has rows for, until they end."""
    groups = crowded("fcfs")
    to = groups.scheduler._groups["b"]
    monkeypatch.setattr(to.policy, "size", lambda waiting: (16, 64))
    drain(groups)
    groups.submit("newcomer", prompt=8, max_tokens=100)
    groups.step(12)
    assert groups.at("a") == set()
    assert to.running == 32 and job_of(groups, "newcomer").state is JobState.QUEUED
    assert len(pauses(groups)) == 16 and max(pauses(groups)) < 2
    finish(groups)
    assert to.size() == (16, 64)


def test_a_job_that_waits_for_a_row_keeps_nobody_from_moving() -> None:
    """The group that stays has rows for half of them: its own go on, the others wait."""
    groups = running(jobs=16, policy="fcfs", block_size=16, host_blocks=512, device_blocks=512)
    drain(groups)
    groups.step(20)
    assert groups.at("a") == set()
    assert sum(job.state is JobState.RUNNING for job in groups.scheduler.jobs()) == 8
    finish(groups)


def test_a_job_decodes_on_while_its_kv_is_on_the_way() -> None:
    groups = running(jobs=2)
    (mover,) = groups.at("a")
    groups.slow = {"a"}
    drain(groups)
    before = len(groups.tokens[mover])
    groups.step(8)
    assert stages(groups) == [Stage.SENDING] and len(groups.tokens[mover]) == before + 8
    groups.slow = {"b"}
    groups.step(8)
    assert stages(groups) == [Stage.COMING] and len(groups.tokens[mover]) == before + 16
    assert job_of(groups, mover).worker_id == "a"
    groups.slow.clear()
    groups.step(2)
    assert job_of(groups, mover).worker_id == "b"
    finish(groups)


def test_only_some_are_sent_at_a_time() -> None:
    groups = running(jobs=16, host_blocks=512, device_blocks=512)
    groups.slow = {"a"}
    drain(groups)
    groups.step(5)
    assert exports(groups) == 4
    finish(groups)
    assert exports(groups) == 8


def test_what_cannot_be_sent_moves_from_its_tokens() -> None:
    groups = running()
    groups.models["a"].sends_in_vain = True
    drain(groups)
    groups.step(12)
    assert groups.at("a") == set()
    counters = groups.scheduler.counters
    assert counters["exports.failed"] == 2 and counters["exports.moved"] == 0
    assert counters["tokens.recomputed"] > 2 * PROMPT
    finish(groups)


def test_a_group_that_could_not_be_reached_is_left_alone_for_a_while() -> None:
    groups = running(jobs=16, host_blocks=512, device_blocks=512)
    groups.models["a"].sends_in_vain = True
    drain(groups)
    groups.run()
    assert exports(groups) == 4
    finish(groups)


def test_a_group_that_takes_kv_elsewhere_is_tried_at_once() -> None:
    groups = running(jobs=16, host_blocks=512, device_blocks=512)
    groups.models["a"].sends_in_vain = True
    drain(groups)
    groups.step(2)
    assert exports(groups) == 4
    groups.models["a"].sends_in_vain = False
    groups.scheduler.take_kv_at("b", KvPlace("b", "layout", ("host:2",)))
    groups.run()
    assert exports(groups) > 4
    finish(groups)


def test_what_arrived_though_nobody_heard_of_it_is_released() -> None:
    groups = running()
    groups.models["a"].sends_unheard = True
    drain(groups)
    groups.step(12)
    assert groups.at("a") == set() and groups.models["b"].imports == {}
    finish(groups)


@pytest.mark.parametrize(
    "place",
    [
        None,
        KvPlace("b", "another layout", ("host:1",)),
        KvPlace("b", "layout", ("host:1", "host:2")),
    ],
)
def test_groups_that_do_not_fit_together_send_nothing(place: KvPlace | None) -> None:
    groups = running()
    groups.scheduler.take_kv_at("b", place)
    drain(groups)
    groups.step(12)
    assert groups.at("a") == set() and exports(groups) == 0
    finish(groups)


def test_without_room_on_the_other_host_jobs_move_from_their_tokens() -> None:
    groups = running(host_blocks=20)
    drain(groups)
    groups.step(12)
    assert groups.at("a") == set() and exports(groups) == 0
    finish(groups)


def test_kv_that_costs_more_to_send_than_to_compute_stays() -> None:
    groups = running()
    source = groups.scheduler._groups["a"]
    source.exports.pending = 26
    source.exports.end(0.0, 100.0, 26)
    drain(groups)
    groups.step(12)
    assert groups.at("a") == set() and exports(groups) == 0
    finish(groups)


@pytest.mark.parametrize("stage", [Stage.SENDING, Stage.COMING, Stage.THERE])
def test_a_job_that_ends_on_the_way_leaves_nothing(stage: Stage) -> None:
    groups = running(jobs=2)
    mover = leave(groups, stage)
    assert groups.scheduler.cancel(mover, groups.now)
    del groups.tokens[mover]
    finish(groups)


@pytest.mark.parametrize("stage", [Stage.SENDING, Stage.COMING, Stage.THERE])
def test_a_drain_that_is_taken_back_leaves_the_jobs_where_they_are(stage: Stage) -> None:
    groups = running(jobs=2)
    mover = leave(groups, stage)
    drain(groups, draining=False)
    assert stages(groups) == [] and job_of(groups, mover).worker_id == "a"
    finish(groups)
    assert groups.scheduler.counters["migrations.drain"] == 0


@pytest.mark.parametrize("stage", [Stage.SENDING, Stage.COMING, Stage.THERE])
def test_the_other_group_drains_as_well(stage: Stage) -> None:
    groups = running(jobs=2)
    leave(groups, stage)
    drain(groups, "b")
    assert stages(groups) == []
    groups.slow.clear()
    drain(groups, "a", draining=False)
    finish(groups)


@pytest.mark.parametrize("stage", [Stage.SENDING, Stage.COMING, Stage.THERE])
@pytest.mark.parametrize("died", [True, False])
def test_the_group_that_sends_is_lost(stage: Stage, died: bool) -> None:
    """What has arrived is used; what was still on its way is not waited for."""
    groups = running(jobs=2)
    mover = leave(groups, stage)
    recomputed = groups.scheduler.counters["tokens.recomputed"]
    model = groups.models.pop("a")
    inventory = model.reconnect(died=died)
    groups.scheduler.remove_worker("a", groups.now)
    groups.scheduler.check_integrity()
    assert job_of(groups, mover).worker_id == "b"
    groups.slow.clear()
    groups.step(12)
    again = groups.scheduler.counters["tokens.recomputed"] - recomputed
    assert (again > PROMPT) is (stage is Stage.SENDING)
    groups.models["a"] = model
    groups.scheduler.add_worker(model.info, inventory, groups.now)
    finish(groups)


@pytest.mark.parametrize("stage", [Stage.SENDING, Stage.COMING, Stage.THERE])
def test_the_group_that_is_sent_to_is_lost(stage: Stage) -> None:
    groups = running(jobs=2)
    mover = leave(groups, stage)
    model = groups.models.pop("b")
    inventory = model.reconnect(died=True)
    groups.scheduler.remove_worker("b", groups.now)
    groups.scheduler.check_integrity()
    assert stages(groups) == [] and job_of(groups, mover).worker_id == "a"
    groups.slow.clear()
    groups.step(3)
    groups.models["b"] = model
    groups.scheduler.add_worker(model.info, inventory, groups.now)
    groups.step(15)
    assert groups.at("a") == set()
    finish(groups)


def test_a_sidecar_that_forgot_what_came_costs_a_prefill() -> None:
    groups = running(jobs=2)
    groups.models["b"].host_loses = True
    drain(groups)
    groups.step(12)
    assert groups.at("a") == set()
    assert groups.scheduler.counters["exports.failed"] == 1
    groups.models["b"].host_loses = False
    finish(groups)


def test_a_waiting_job_takes_its_host_copy_along() -> None:
    """An idle group comes: what waits on the host of the busy one goes on there, uploaded."""
    groups = Groups(
        {"a": 1.0, "b": 1.0},
        {"policy": "skip-join-mlfq", "quantum_s": 0.04},
        peers=True,
        max_num_seqs=2,
        device_blocks=64,
        host_blocks=256,
    )
    drain(groups, "b")
    for number in range(6):
        groups.submit(f"j{number}", prompt=PROMPT, max_tokens=100)
    groups.step(60)
    assert any(job.kv is KvState.HOST for job in groups.scheduler.jobs())
    drain(groups, "b", draining=False)
    groups.step(20)
    counters = groups.scheduler.counters
    assert counters["exports.moved"] == counters["migrations.balance"] > 0
    arrived = {job for name, kind, job in groups.ops if (name, kind) == ("b", KvOpKind.UPLOAD)}
    assert arrived, "nothing was uploaded"
    finish(groups)


def test_a_job_that_gets_a_row_before_its_kv_has_arrived_stays() -> None:
    groups = running(jobs=2)
    (mover,) = groups.at("a")
    job, migrations = job_of(groups, mover), groups.scheduler._migrations
    source, to = (groups.scheduler._groups[name] for name in "ab")
    migrations.begin(job, source, to, PreemptReason.BALANCE)
    groups.step(5)
    assert job.worker_id == "a" and exports(groups) == 1 and stages(groups) == []
    finish(groups)
