"""Plans: who gets a row, who leaves the device and who comes back."""

from __future__ import annotations

import pytest

from fastserve.scheduler.core import (
    EventKind,
    JobState,
    KvOpKind,
    KvState,
    KvStatus,
    KvStrategy,
    OpDone,
    Report,
)
from support.scheduler_rig import Rig
from support.worker_model import worker_info


def test_a_new_short_job_takes_the_row_of_a_long_one_which_stays_on_the_device() -> None:
    rig = Rig(max_num_seqs=1)
    rig.submit("long", max_tokens=40)
    rig.run(5)  # it has sunk by now
    rig.submit("short", max_tokens=2)
    assert rig.rows() == [("short", 4)]
    assert rig.job("long").state is JobState.PREEMPTED
    assert rig.job("long").kv is KvState.DEVICE and not rig.ops
    assert rig.scheduler.counters["preemptions.priority.resident"] == 1
    assert rig.run(3) == ["short"]
    assert rig.job("long").state is JobState.RUNNING


def test_with_fcfs_it_waits() -> None:
    rig = Rig({"policy": "fcfs"}, max_num_seqs=1)
    rig.submit("long", max_tokens=10)
    rig.run(3)
    rig.submit("short", max_tokens=1)
    assert rig.run(12) == ["long", "short"]


def test_equals_do_not_preempt_each_other() -> None:
    rig = Rig(max_num_seqs=1, max_num_batched_tokens=16)
    rig.submit("first", prompt=6, max_tokens=30)
    rig.plan()
    rig.submit("second", prompt=6, max_tokens=30)
    assert rig.job("first").level == rig.job("second").level
    assert rig.plan() is None


def test_prompts_are_chunked_and_leave_tokens_for_the_rows_behind() -> None:
    rig = Rig(max_num_batched_tokens=16, device_blocks=64, max_model_len=200)
    rig.submit("decoding", max_tokens=30)
    rig.run(1)
    rig.submit("prompt", prompt=60)
    rows = dict(rig.rows())
    assert rows["decoding"] == 1 and 8 <= rows["prompt"] <= 15


def test_only_so_many_prefills_are_under_way() -> None:
    rig = Rig({"max_partial_prefills": 1}, max_num_batched_tokens=16, device_blocks=64)
    for name in "ab":
        rig.submit(name, prompt=40)
    assert [name for name, _ in rig.rows()] == ["a"]


def test_a_plan_is_only_renewed_when_its_lease_runs_down() -> None:
    rig = Rig({"lease": 4, "policy": "fcfs"})
    rig.submit("a", max_tokens=30)
    assert rig.plan() is not None
    renewed = []
    for _ in range(8):
        rig.step()
        renewed.append(rig.plan() is not None)
    # After the prefill the row changes from 4 tokens to 1, which the worker knows by itself.
    assert renewed == [False, True] * 4


def test_who_has_no_room_waits_until_worse_ones_have_left() -> None:
    """16 blocks: the long job has 10 and more to come, the new one needs 9."""
    rig = Rig(device_blocks=16)
    rig.submit("long", prompt=36, max_tokens=20)
    rig.run(8)
    rig.submit("new", prompt=30, max_tokens=2, priority=-1)
    rig.slow_copies = True
    rig.run(1)
    assert rig.ops == [(KvOpKind.OFFLOAD, "long")]
    assert rig.job("long").kv is KvState.OFFLOADING
    assert rig.job("new").state is JobState.QUEUED  # the blocks are not free yet
    rig.slow_copies = False
    ended = rig.run(20)
    assert ended[0] == "new"
    assert (KvOpKind.UPLOAD, "long") in rig.ops
    assert rig.run(40) == ["long"] if "long" not in ended else True
    assert rig.scheduler.counters["tokens.recomputed"] == 0
    assert rig.scheduler.counters["preemptions.memory.swap"] == 1


def test_a_row_goes_on_in_the_blocks_that_it_has_while_others_leave_for_it() -> None:
    """Blocks of 8 tokens. One more is booked for what two leases take, long before it is used."""
    rig = Rig(max_num_seqs=2, device_blocks=4, block_size=8, max_model_len=32)
    rig.slow_copies = True
    rig.submit("first", prompt=9, max_tokens=20, priority=-1)
    rig.submit("second", prompt=9, max_tokens=20)
    first, second = rig.job("first"), rig.job("second")
    while second.kv is KvState.DEVICE or second.kv is KvState.NONE:
        rig.run()
    assert second.kv is KvState.OFFLOADING and first.known_len <= 12
    lengths = []
    for _ in range(8):
        lengths.append(first.known_len)
        rig.run()
    assert lengths == [*range(lengths[0], 16), *[16] * (8 - 16 + lengths[0])]
    rig.worker.finish_copies()
    rig.run(2)
    assert first.known_len > 16


def test_a_complete_host_copy_makes_leaving_free() -> None:
    rig = Rig(device_blocks=16)
    rig.submit("long", prompt=36, max_tokens=20)
    rig.run(8)
    rig.submit("new", prompt=30, max_tokens=2, priority=-1)
    while rig.job("long").kv is not KvState.HOST:
        rig.run(1)
    while rig.job("long").kv is not KvState.DEVICE:
        rig.run(1)
    # It is back and has not run yet: its host copy is complete.
    before = len(rig.ops)
    assert rig.job("long").host_tokens >= rig.job("long").computed
    rig.submit("newer", prompt=30, max_tokens=2, priority=-1)
    rig.plan()
    assert rig.ops[before:] == [(KvOpKind.DROP_DEVICE, "long")]
    assert rig.job("newer").state is JobState.RUNNING  # in the same plan


def test_without_host_memory_it_is_computed_again() -> None:
    rig = Rig(device_blocks=16, host_blocks=0)
    rig.submit("long", prompt=36, max_tokens=20)
    rig.run(8)
    rig.submit("new", prompt=30, max_tokens=2, priority=-1)
    ended = rig.run(60)
    assert ended == ["new", "long"]
    assert rig.ops.count((KvOpKind.DROP_DEVICE, "long")) == 1
    assert rig.scheduler.counters["tokens.recomputed"] >= 36
    assert rig.scheduler.counters["preemptions.memory.recompute"] == 1
    kinds = [event.kind for event in rig.scheduler.drain_events() if event.job_id == "long"]
    assert EventKind.DROPPED in kinds


def test_a_lost_host_copy_is_computed_again() -> None:
    rig = Rig(device_blocks=16)
    rig.submit("long", prompt=36, max_tokens=20)
    rig.run(8)
    rig.submit("new", prompt=30, max_tokens=2, priority=-1)
    while rig.job("long").kv is not KvState.HOST:
        rig.run(1)
    rig.worker.host_loses = True
    assert rig.run(80) == ["new", "long"]
    assert rig.scheduler.counters["tokens.recomputed"] >= 36


def test_who_does_not_fit_is_passed_by_those_who_do() -> None:
    rig = Rig({"policy": "fcfs"}, device_blocks=16)
    rig.submit("running", prompt=30, max_tokens=20)
    rig.run(2)
    rig.submit("large", prompt=40, max_tokens=8)
    rig.submit("small", max_tokens=1)
    assert rig.run(3) == ["small"]
    assert rig.job("large").state is JobState.QUEUED


def test_but_not_for_ever() -> None:
    rig = Rig({"policy": "fcfs", "starvation_s": 0.05}, device_blocks=16)
    rig.submit("running", prompt=16, max_tokens=30, length=30)
    rig.run(2)
    rig.submit("large", prompt=48, max_tokens=8)
    for number in range(30):
        rig.submit(f"small{number}", prompt=16, max_tokens=4)
    ended = rig.run(300)
    assert "large" in ended
    behind = [name for name in ended[ended.index("large") :] if name.startswith("small")]
    assert len(behind) > 15, "nearly all small ones overtook it"


def test_jobs_come_back_ahead_of_need_only_when_plenty_is_free() -> None:
    """Three jobs of 8 blocks on a device of 24 with one row."""
    rig = Rig(max_num_seqs=1, device_blocks=24, max_model_len=200)
    for name in "abc":
        rig.submit(name, prompt=24, max_tokens=10, length=8)
    ended = rig.run(300)
    assert sorted(ended) == ["a", "b", "c"]
    ups = [name for kind, name in rig.ops if kind is KvOpKind.UPLOAD]
    downs = [
        name
        for kind, name in rig.ops
        if kind is not KvOpKind.RELEASE and kind is not KvOpKind.UPLOAD
    ]
    assert len(ups) <= len(downs) <= 12, "to and fro"


def test_cancelled_jobs_stop_and_are_released() -> None:
    rig = Rig()
    rig.submit("a", max_tokens=30)
    rig.run(2)
    assert rig.scheduler.cancel("a", rig.now) and not rig.scheduler.cancel("a", rig.now)
    assert rig.rows() == []
    assert rig.ops == [(KvOpKind.RELEASE, "a")]
    rig.run(2)
    assert not rig.worker.held and rig.worker.free_device == rig.info.device_blocks


@pytest.mark.parametrize("lease", [1, 4])
def test_every_iteration_counts_a_token_per_decode_row(lease: int) -> None:
    rig = Rig({"lease": lease}, max_num_batched_tokens=64, device_blocks=64)
    for name in "abcd":
        rig.submit(name, max_tokens=10)
    assert sorted(rig.run(10)) == list("abcd")


def test_caps_of_the_configuration_hold() -> None:
    rig = Rig({"max_num_seqs": 2, "max_num_batched_tokens": 5}, device_blocks=64)
    for name in "abc":
        rig.submit(name)
    rows = rig.rows()
    assert len(rows) <= 2 and sum(tokens for _, tokens in rows) <= 5
    assert worker_info().max_num_seqs > 2


def test_whoever_is_on_the_device_runs_behind_a_head_that_cannot_start() -> None:
    """The best of them first. The head, as many jobs as a plan looks at, waits for memory."""
    rig = Rig(
        {"policy": "fixed-priority", "kv_strategy": KvStrategy.DEFER, "look_ahead": 1},
        max_num_seqs=1,
    )
    rig.submit("worse", prompt=20, max_tokens=8)
    rig.run(2)
    rig.submit("better", prompt=16, max_tokens=8, priority=-1)
    rig.run(1)
    for name in ("hungry", "starving", "greedy"):
        rig.submit(name, prompt=40, max_tokens=8, priority=-2)
    assert rig.run(9) == ["better"]
    assert rig.job("worse").preemptions == 1


def test_what_a_cancelled_job_held_is_counted_once_its_copy_has_ended() -> None:
    rig = Rig({"policy": "fixed-priority"}, device_blocks=16)
    group = rig.scheduler._groups["w"]
    rig.submit("old", prompt=36, max_tokens=20)
    rig.run(4)
    rig.slow_copies = True
    rig.submit("urgent", prompt=30, max_tokens=2, priority=-1)
    rig.run(2)
    assert rig.job("old").kv is KvState.OFFLOADING
    rig.scheduler.cancel("old", rig.now)
    rig.run(3)
    assert group.device_used >= 9, "the copy reads them still"
    rig.slow_copies = False
    assert rig.run(20) == ["urgent"]
    assert (group.device_used, group.host_used) == (0, 0)


def test_a_dropped_host_copy_is_forgotten() -> None:
    rig = Rig(device_blocks=64)
    rig.submit("a", max_tokens=30)
    rig.run(3)
    job, group = rig.job("a"), rig.scheduler._groups["w"]
    job.host_tokens = 4
    group.book_host(job, 1)
    number = group.operation(KvOpKind.DROP_HOST, job, rig.now)
    done = OpDone(number, KvStatus.OK)
    rig.scheduler.on_report("w", Report(group.plan_id, 0, ops=[done]), rig.now)
    assert (job.host_tokens, job.host_booked, group.host_used, job.op) == (0, 0, 0, None)


def test_small_jobs_pass_one_that_waits_for_memory_until_it_starves() -> None:
    rig = Rig({"policy": "fcfs", "starvation_s": 0.05}, device_blocks=16)
    rig.submit("running", prompt=30, max_tokens=20)
    rig.run(1)
    rig.submit("large", prompt=40, max_tokens=8)
    rig.submit("early", prompt=4, max_tokens=1)
    assert rig.run(2) == ["early"]
    rig.run(5)
    rig.submit("late", prompt=4, max_tokens=1)
    assert rig.run(3) == [], "what is free is kept for the large one"
    ended = rig.run(40)
    assert ended[0] == "running" and set(ended) == {"running", "large", "late"}


@pytest.mark.parametrize("strategy", ["proactive", "reactive", "recompute", "defer"])
def test_the_device_is_never_full_of_jobs_that_wait_for_each_other(strategy: str) -> None:
    """Each wants a block of the other; the younger is ahead in the order, and neither may lose its
    cache for a younger one again. Nobody ever starves here."""
    rig = Rig(
        {"policy": "skip-join-mlfq", "levels": 6, "quantum_s": 1.0, "kv_strategy": strategy},
        device_blocks=16,
        host_blocks=0,
        max_num_seqs=2,
    )
    for name in ("older", "younger"):
        rig.submit(name, prompt=8, max_tokens=40)
    rig.run(3)
    older = rig.job("older")
    older.level = 3
    rig.scheduler._groups["w"].queue.update(older)
    for name in ("older", "younger"):
        rig.job(name).drops = 2
    assert set(rig.run(120)) == {"older", "younger"}
