"""Who may be put aside for whom, and what must be free for a job that comes back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastserve.scheduler.core import Job, JobState, KvState, KvStrategy
from fastserve.scheduler.core.draft import Draft
from fastserve.scheduler.core.eviction import victims_for
from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.kv_planner import headroom
from support.scheduler_rig import Rig

COPY_S = 0.1  # of one block, each way


def group_of(rig: Rig) -> Group:
    return rig.scheduler._groups["w"]


def at_rest(strategy: str = "proactive", **config: Any) -> tuple[Rig, Job, Job]:
    """A job on the host that comes first in the order, and one that runs, far behind it."""
    rig = Rig(
        {"policy": "skip-join-mlfq", "kv_strategy": strategy, **config},
        device_blocks=12,
        max_num_seqs=4,
    )
    for channel in (group_of(rig).outward, group_of(rig).inward):
        channel.pending = 20
        channel.end(began=0.0, seconds=20 * COPY_S, blocks=20)
    rig.submit("waits", prompt=20, max_tokens=20)
    rig.run(3)
    waits = rig.job("waits")
    group_of(rig).stop(waits, rig.now)
    waits.host_tokens, waits.computed = waits.computed, 0
    group_of(rig).set_kv(waits, KvState.HOST)
    rig.submit("runs", prompt=20, max_tokens=20)
    rig.run(3)
    runs = rig.job("runs")
    runs.level = 9
    group_of(rig).queue.update(runs)
    assert (waits.kv, runs.state) == (KvState.HOST, JobState.RUNNING)
    return rig, waits, runs


def victims(rig: Rig, job: Job, *, starving: bool = False) -> list[str]:
    draft = Draft(group_of(rig), rig.now, 4, head=group_of(rig).queue.first(10))
    return [victim.job_id for victim in victims_for(draft, job, starving=starving)]


def serve(job: Job, seconds: float) -> None:
    job.attained = job.held_from + seconds


def copies_of(rig: Rig, job: Job) -> float:
    """Seconds that it takes to put the job aside and to bring it back."""
    group = group_of(rig)
    return (group.to_store(job) + job.booked) * COPY_S + 4 * group.cost.decode_s


@pytest.mark.parametrize("starving", [False, True])
def test_who_comes_back_waits_until_the_copies_of_the_other_are_a_thirtieth_of_its_time(
    starving: bool,
) -> None:
    rig, waits, runs = at_rest()
    waits.boosted = starving  # those that are promoted, too
    serve(runs, 29 * copies_of(rig, runs))
    assert victims(rig, waits, starving=starving) == []
    serve(runs, 31 * copies_of(rig, runs))
    assert victims(rig, waits, starving=starving) == ["runs"]


def test_it_never_waits_for_longer_than_a_job_may_starve() -> None:
    rig, waits, runs = at_rest(starvation_s=0.5)
    serve(runs, 0.49)
    assert victims(rig, waits) == []
    serve(runs, 0.51)
    assert victims(rig, waits) == ["runs"]


def test_newcomers_rows_that_grow_and_who_is_more_urgent_do_not_wait() -> None:
    rig, waits, runs = at_rest()
    assert victims(rig, waits) == []
    rig.submit("new", prompt=20, max_tokens=20, priority=-1)
    assert victims(rig, rig.job("new")) == ["runs"]
    waits.booked = 1  # as if it were on the device
    assert victims(rig, waits) == ["runs"]
    waits.booked = 0
    runs.spec = replace(runs.spec, priority=1)
    assert victims(rig, waits) == ["runs"]


@pytest.mark.parametrize("strategy", ["reactive", "recompute"])
def test_only_the_proactive_strategy_does_so(strategy: str) -> None:
    rig, waits, _ = at_rest(strategy)
    assert victims(rig, waits) == ["runs"]


def test_who_comes_back_finds_room_for_what_rows_grow_by_meanwhile() -> None:
    rig, waits, _ = at_rest()
    group = group_of(rig)
    group.info = replace(group.info, device_blocks=99)
    need = group.need(waits, group.config.lease)
    away_s = 2 * need * COPY_S + 4 * group.cost.decode_s
    grown = group.running * away_s / group.cost.decode_s / group.info.block_size
    assert headroom(group, waits, need) == int(grown) > 0


def test_room_beside_it_is_never_more_than_there_is() -> None:
    rig, waits, _ = at_rest()
    assert headroom(group_of(rig), waits, 11) == 1
    assert headroom(group_of(rig), waits, 12) == 0


def test_newcomers_and_other_strategies_keep_no_room_beside_them() -> None:
    rig, waits, _ = at_rest()
    rig.submit("new", prompt=20, max_tokens=20)
    assert headroom(group_of(rig), rig.job("new"), 2) == 0
    rig, waits, _ = at_rest(KvStrategy.REACTIVE)
    assert headroom(group_of(rig), waits, 2) == 0
