"""Estimates of who runs when, and what they and measured copies make of the device's memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.scheduler.core import Job, JobState, KvOpKind, KvState
from fastserve.scheduler.core.enst import next_scheduled
from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.kv_planner import reserve_blocks
from fastserve.scheduler.core.policies import POLICIES
from fastserve.scheduler.core.transfers import Newcomers, Pace, Transfers
from support.scheduler_rig import Rig


def group_of(rig: Rig) -> Group:
    return rig.scheduler._groups["w"]


def estimates(rig: Rig) -> dict[str, float]:
    group = group_of(rig)
    times = next_scheduled(group, group.queue.first(100), rig.now)
    return {job.job_id: seconds for job, seconds in times.items()}


# --- when a job runs next ------------------------------------------------------------------------


def at_level(rig: Rig, name: str, level: int, used: float = 0.0) -> Job:
    rig.submit(name)
    return to_level(rig, name, level, used)


def to_level(rig: Rig, name: str, level: int, used: float = 0.0) -> Job:
    job = rig.job(name)
    job.level, job.used = level, used
    group_of(rig).queue.update(job)
    return job


def test_the_work_ahead_is_what_others_may_use_before_they_sink_behind() -> None:
    """Two rows; quanta of 10, 20, 40 ms."""
    rig = Rig({"policy": "skip-join-mlfq", "levels": 3, "quantum_s": 0.010}, max_num_seqs=2)
    at_level(rig, "a", 0, used=0.004)
    at_level(rig, "b", 1)
    at_level(rig, "c", 1)
    at_level(rig, "d", 2)
    assert estimates(rig) == pytest.approx(
        {
            "a": 0.0,
            "b": 0.006 / 2,  # a sinks to the back of its level
            "c": (0.006 + 0.020) / 2,  # b is before it in the level
            "d": (0.026 + 0.020 + 0.020) / 2,
        }
    )


def test_who_has_a_row_runs_now_and_is_ahead_of_the_others() -> None:
    rig = Rig({"policy": "skip-join-mlfq", "levels": 3, "quantum_s": 0.020}, max_num_seqs=1)
    rig.submit("a", max_tokens=20)
    rig.run(1)
    rig.submit("b")
    job = rig.job("a")
    assert job.state is JobState.RUNNING and job.level == 0
    assert estimates(rig) == pytest.approx({"a": 0.0, "b": 0.020 - job.used})


def test_who_starves_soon_runs_soon() -> None:
    """Four rows, of which one is for those that starved: 10 ms for each of them in turn."""
    rig = Rig(
        {"policy": "skip-join-mlfq", "levels": 3, "quantum_s": 0.010, "starvation_s": 5.0},
        max_num_seqs=4,
    )
    for name in "abcdef":
        at_level(rig, name, 2)
    for name, waited in (("e", 4.0), ("f", 6.0), ("d", 6.0)):
        rig.job(name).wait_since = rig.now - waited
        group_of(rig).waiting.move_to_end(rig.job(name), last=False)
    found = estimates(rig)
    assert (found["d"], found["f"]) == pytest.approx((0.0, 0.010))
    # Lifted in 1 s at the earliest, but its turn in the order comes before.
    assert found["e"] == pytest.approx(4 * 0.040 / 4)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_nobody_is_estimated_to_run_before_who_is_ahead(policy: str) -> None:
    rig = Rig({"policy": policy, "levels": 4}, max_num_seqs=1)
    for number in range(12):
        rig.submit(f"j{number}", prompt=1 + 3 * number % 13, max_tokens=30)
        rig.run(2)
    group = group_of(rig)
    head = group.queue.first(100)
    times = next_scheduled(group, head, rig.now)
    waiting = [times[job] for job in head if job.state is not JobState.RUNNING]
    assert waiting == sorted(waiting) and waiting[-1] > 0 and len(times) == len(head)


def test_only_those_looked_at_have_an_estimate() -> None:
    """As many as the head has, and as many of those that wait longest: not the queue."""
    rig = Rig({"starvation_s": 1.0})
    for number in range(50):
        rig.submit(f"j{number}")
    group = group_of(rig)
    assert len(next_scheduled(group, group.queue.first(5), 10.0)) <= 10


# --- what is measured ----------------------------------------------------------------------------


def test_a_copy_that_waited_for_others_counts_with_what_it_took_itself() -> None:
    channel = Transfers()
    assert channel.seconds(10) == 0.0 == channel.usual
    channel.pending = 30
    channel.end(began=5.0, seconds=0.2, blocks=20)
    channel.end(began=5.0, seconds=0.3, blocks=10)  # 0.2 of it in the queue
    assert channel.block_s == pytest.approx(0.010, rel=0.1)
    assert channel.usual == pytest.approx(15, rel=0.1)
    channel.pending = 7
    assert channel.seconds(3) == pytest.approx(10 * channel.block_s + channel.fixed_s)
    channel.end(began=9.0, seconds=0.0, blocks=7)  # nothing was copied: it says nothing
    assert channel.pending == 0 and channel.block_s == pytest.approx(0.010, rel=0.1)


def test_a_copy_takes_some_time_whatever_its_size() -> None:
    channel = Transfers()
    for number in range(30):
        blocks = 1 + number % 7
        channel.pending += blocks
        channel.end(float(number), 0.008 + blocks * 0.0005, blocks)
    assert channel.block_s == pytest.approx(0.0005)
    assert channel.fixed_s == pytest.approx(0.008)
    assert channel.seconds(100) == pytest.approx(0.058)
    assert channel.most(0.007) == 0 and channel.most(0.0131) == 10
    for number in range(30, 230):  # all of one size: their mean is all that can be said
        channel.pending += 4
        channel.end(float(number), 0.010, 4)
    assert channel.seconds(4) == pytest.approx(0.010)
    assert channel.block_s == pytest.approx(0.0025)
    assert channel.fixed_s == pytest.approx(0, abs=1e-9)


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(1e-6, 10.0)), min_size=1, max_size=60))
def test_what_was_usual_is_expected_again(copies: list[tuple[int, float]]) -> None:
    channel = Transfers()
    for number, (blocks, seconds) in enumerate(copies):
        channel.pending += blocks
        channel.end(100.0 * number, seconds, blocks)
    assert channel.block_s > 0 and channel.fixed_s >= 0
    mean = channel._seconds / channel._copies
    assert channel.seconds(channel.usual) == pytest.approx(mean, rel=1e-6)
    assert channel.seconds(channel.usual + 10) > mean


def test_newcomers_count_by_their_rate_which_fades() -> None:
    newcomers = Newcomers()
    for tick in range(1000):
        newcomers.note(4, tick * 0.1)
    assert newcomers.blocks_per_s(100.0) == pytest.approx(40, rel=0.02)
    # 10 jobs of 4 blocks are expected in a second; 2 deviations of their number are 6.3 jobs.
    assert newcomers.most(1.0, 100.0) == pytest.approx(40 + 4 * 6.3, rel=0.02)
    assert newcomers.blocks_per_s(200.0) < 0.01


# --- the reserve ---------------------------------------------------------------------------------


def test_the_reserve_follows_newcomers_rows_and_copies() -> None:
    rig = Rig(device_blocks=1000, max_num_seqs=4, max_model_len=64)
    group = group_of(rig)
    assert reserve_blocks(group, rig.now) == 0  # nobody came, nothing grows
    for number in range(4):
        rig.submit(f"j{number}", prompt=12, max_tokens=40)
    rig.run(2)
    busy = reserve_blocks(group, rig.now)
    assert busy > 0
    group.outward.pending = 10
    group.outward.end(began=0.0, seconds=0.5, blocks=10)
    slow = reserve_blocks(group, rig.now)
    assert slow > busy  # while 10 blocks leave, more is taken
    rig.run(1)
    later = reserve_blocks(group, rig.now + 100.0)
    assert later < slow  # only the rows still grow
    group.config = replace(group.config, kv_reserve_blocks=3)
    assert reserve_blocks(group, rig.now) == 3
    group.config = replace(group.config, kv_reserve_blocks=5000)
    assert reserve_blocks(group, rig.now) == 1000


# --- leaving and coming back ---------------------------------------------------------------------


def test_who_waits_for_its_own_upload_is_counted_as_waiting_for_kv() -> None:
    rig = Rig({"kv_strategy": "reactive"}, device_blocks=16)
    rig.submit("long", prompt=36, max_tokens=20)
    rig.run(8)
    rig.submit("new", prompt=30, max_tokens=2, priority=-1)
    while rig.job("long").kv is not KvState.HOST:
        rig.run(1)
    while rig.job("long").op is not KvOpKind.UPLOAD:
        rig.plan()
        rig.step()
    rig.slow_copies = True
    rig.plan()
    before, _ = rig.scheduler.kv_wait()
    started = rig.now
    for _ in range(5):
        rig.now += 0.1
        rig.plan()
    waited, executed = rig.scheduler.kv_wait()
    assert waited - before == pytest.approx(rig.now - started)
    assert executed > 0
    rig.slow_copies = False
    rig.run(2)
    ended, _ = rig.scheduler.kv_wait()
    rig.run(5)
    assert rig.scheduler.kv_wait()[0] == ended  # it runs


def starving_in_turn(kv_strategy: str) -> float:
    """Four jobs of which two fit, one row, promotions all the time: share of time lost to KV."""
    rig = Rig(
        {"policy": "skip-join-mlfq", "starvation_s": 0.3, "kv_strategy": kv_strategy},
        device_blocks=26,
        max_num_seqs=1,
    )
    for name in "abcd":
        rig.submit(name, prompt=24, max_tokens=36)
    for _ in range(120):
        rig.run(1)
    assert rig.scheduler.counters["promotions"] > 3
    waited, executed = rig.scheduler.kv_wait()
    return waited / executed


def test_who_is_lifted_next_comes_back_before_that() -> None:
    assert starving_in_turn("proactive") < starving_in_turn("reactive") / 2


def test_the_next_in_line_comes_back_long_before_its_turn() -> None:
    """In place of one behind it, whatever the estimate: a running answer may end at any time."""
    rig = Rig(
        {"policy": "skip-join-mlfq", "levels": 4, "quantum_s": 1.0, "kv_write_through": False},
        device_blocks=18,
        max_num_seqs=1,
    )
    for name in "ab":
        rig.submit(name, prompt=20, max_tokens=20)
        rig.run(2)
        to_level(rig, name, 3)
    rig.submit("running", prompt=12, max_tokens=30)
    while rig.job("b").kv is not KvState.HOST:
        rig.run(1)
    assert rig.job("a").kv is KvState.DEVICE
    to_level(rig, "b", 2)  # the order turns, and with it who should be on the device
    assert estimates(rig)["b"] > 0.5
    while rig.job("b").kv is not KvState.DEVICE:
        rig.run(1)
    assert rig.job("running").state is JobState.RUNNING
    assert rig.job("a").kv is KvState.HOST
    assert set(rig.run(100)) == {"a", "b", "running"}


def test_who_joins_while_an_older_plan_runs_never_needs_more_than_it_booked() -> None:
    """When its KV leaves then, it is booked anew: not for iterations of plans without it."""
    rig = Rig({"lease": 4}, device_blocks=16)
    for name in "ab":
        rig.submit(name, prompt=8, max_tokens=20)
    group, a, b = group_of(rig), rig.job("a"), rig.job("b")
    group.set_kv(a, KvState.DEVICE)
    group.set_kv(b, KvState.DEVICE)
    group.send(4, [a.decode_row()], {a})
    group.book(b, 4)
    booked = b.booked
    group.send(4, [a.decode_row(), b.decode_row()], {a, b})
    group.set_kv(b, KvState.OFFLOADING)
    assert b.booked == booked == 3  # 8 tokens and 4 iterations in blocks of 4
    group.reached(2, 1, rows=2, seconds=0.01)
    assert (group.pending(a), group.pending(b)) == (3, 3)


# --- copies ahead of leaving, and leaving without one --------------------------------------------


def copies_of(rig: Rig, name: str) -> int:
    return rig.ops.count((KvOpKind.COPY_OUT, name))


def test_full_blocks_are_copied_out_while_their_job_runs_when_memory_is_short() -> None:
    rig = Rig(device_blocks=16, max_num_seqs=2)
    rig.submit("a", prompt=20, max_tokens=28)
    rig.submit("b", prompt=12, max_tokens=28)
    rig.slow_copies = True
    while not copies_of(rig, "a") + copies_of(rig, "b"):
        rig.run(1)
    (copied,) = {name for kind, name in rig.ops if kind is KvOpKind.COPY_OUT}
    job = rig.job(copied)
    before = len(job.output)
    rig.run(2)
    assert job.state is JobState.RUNNING and job.op is KvOpKind.COPY_OUT
    assert len(job.output) == before + 2  # it goes on meanwhile
    rig.slow_copies = False
    rig.run(1)
    assert 0 < job.host_tokens <= job.computed and job.host_tokens % 4 == 0
    assert job.kv is KvState.DEVICE
    assert set(rig.run(80)) == {"a", "b"}
    assert rig.scheduler.counters["tokens.copy_out"] > 0
    assert rig.scheduler.counters["tokens.recomputed"] == 0


@pytest.mark.parametrize(("fixed_ms", "worth_it"), [(0.3, True), (30.0, False)])
def test_nothing_is_copied_ahead_that_costs_more_in_calls_than_in_bytes(
    fixed_ms: float, worth_it: bool
) -> None:
    """A copy takes `fixed_ms` and 1 ms a block; jobs have up to 12."""
    rig = Rig(device_blocks=16, max_num_seqs=2)
    for at, blocks in enumerate((1, 4) * 20):
        group_of(rig).outward.pending += blocks
        group_of(rig).outward.end(at, (fixed_ms + blocks) / 1000, blocks)
    rig.submit("a", prompt=20, max_tokens=28)
    rig.submit("b", prompt=12, max_tokens=28)
    assert set(rig.run(80)) == {"a", "b"}
    assert (rig.scheduler.counters["tokens.copy_out"] > 0) == worth_it


@pytest.mark.parametrize(
    ("config", "worker"),
    [
        ({"kv_write_through": False}, {}),
        ({"kv_strategy": "reactive"}, {}),
        ({}, {"host_blocks": 0}),
        ({}, {"device_blocks": 100_000}),  # plenty: it will not be full for long
    ],
)
def test_otherwise_nothing_is_copied_ahead(
    config: dict[str, object], worker: dict[str, int]
) -> None:
    rig = Rig(config, **({"device_blocks": 16, "max_num_seqs": 2} | worker))
    group_of(rig).outward.end(began=0.0, seconds=0.001, blocks=1)
    rig.submit("a", prompt=20, max_tokens=28)
    rig.submit("b", prompt=12, max_tokens=28)
    rig.run(60)
    assert not copies_of(rig, "a") + copies_of(rig, "b")


def test_a_host_that_refuses_a_copy_changes_nothing() -> None:
    rig = Rig(device_blocks=16, max_num_seqs=2)
    rig.worker.host_refuses = True
    rig.submit("a", prompt=20, max_tokens=28)
    rig.submit("b", prompt=12, max_tokens=28)
    rig.run(20)
    tried = copies_of(rig, "a") + copies_of(rig, "b")
    assert tried == 1  # the host is left alone for a second
    assert group_of(rig).host_used == 0


def test_copying_ahead_keeps_its_pace_as_long_as_iterations_do() -> None:
    pace = Pace()
    assert pace.budget_s(1.0) == pytest.approx(0.02)  # 2 % of a second
    pace.begin(1, 1.0)
    assert pace.budget_s(1.1) == pytest.approx(0.002)
    assert pace.budget_s(1e6) == pytest.approx(0.08)  # what was saved up is not spent at once
    for _ in range(500):
        pace.observe(0.0101, 0.010)  # 1 % slower than without
    assert pace.share == 0.25  # some iterations without copies are left to compare with
    for _ in range(500):
        pace.observe(0.0105, 0.010)
    assert pace.share == 0.02
    pace.copies = 0
    for _ in range(500):
        pace.observe(0.0105, 0.010)  # the model is wrong, or other work is beside it
    pace.copies = 1
    for _ in range(500):
        pace.observe(0.0105, 0.010)
    assert pace.share == 0.25


def leaving(block_s: float) -> list[KvOpKind]:
    """What a job of 36 tokens and more does for an urgent one, with a link of this speed."""
    rig = Rig({"kv_write_through": False}, device_blocks=16)
    for channel in (group_of(rig).outward, group_of(rig).inward):
        channel.pending = 100
        channel.end(began=0.0, seconds=100 * block_s, blocks=100)
    rig.submit("long", prompt=36, max_tokens=20)
    rig.run(8)
    rig.submit("new", prompt=30, max_tokens=2, priority=-1)
    assert rig.run(60) == ["new", "long"]
    return [kind for kind, name in rig.ops if name == "long" and kind is not KvOpKind.RELEASE]


def test_the_cheaper_of_copying_and_computing_again() -> None:
    assert leaving(block_s=0.0001) == [KvOpKind.OFFLOAD, KvOpKind.UPLOAD]
    assert leaving(block_s=1.0) == [KvOpKind.DROP_DEVICE]


def test_a_copy_that_would_take_too_long_to_come_back_is_given_up() -> None:
    rig = Rig({"kv_write_through": False, "kv_reserve_blocks": 8}, device_blocks=16)
    rig.submit("long", prompt=36, max_tokens=20)
    rig.run(8)
    rig.submit("new", prompt=30, max_tokens=2, priority=-1)
    while rig.job("long").kv is not KvState.HOST:
        rig.run(1)
    group_of(rig).inward.pending = 100
    group_of(rig).inward.end(began=0.0, seconds=100.0, blocks=100)
    assert rig.run(60) == ["new", "long"]
    assert (KvOpKind.DROP_HOST, "long") in rig.ops and (KvOpKind.UPLOAD, "long") not in rig.ops


def test_nobody_loses_its_cache_again_and_again_however_slow_the_link() -> None:
    rig = Rig({"starvation_s": 0.05}, device_blocks=16, max_num_seqs=2)
    for channel in (group_of(rig).outward, group_of(rig).inward):
        channel.pending = 100
        channel.end(began=0.0, seconds=1000.0, blocks=100)
    for number in range(6):
        rig.submit(f"j{number}", prompt=20, max_tokens=30)
    ended = rig.run(600)
    assert len(ended) == 6
    # Twice the whole cache for each of them, and the ends of blocks.
    assert rig.scheduler.counters["tokens.recomputed"] < 6 * (2 * 50 + 50)
