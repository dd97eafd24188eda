"""Every option of the scheduler changes what it says it does."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastserve.scheduler.core import KvOpKind, KvState, SchedulerConfig
from support.scheduler_rig import Rig


def test_the_first_quantum_is_measured_or_given() -> None:
    measured = Rig().scheduler
    assert measured.level_quanta()[:3] == [0.010, 0.020, 0.040]
    given = Rig({"quantum_s": 0.5, "quantum_ratio": 3.0, "levels": 3}).scheduler
    assert given.level_quanta() == [0.5, 1.5, 4.5]


def test_a_given_quantum_does_not_follow_the_measurement() -> None:
    def first_quantum(**config: Any) -> float:
        rig = Rig(config)
        rig.submit("a", max_tokens=30)
        for _ in range(20):
            rig.plan()
            report = rig.worker.step(seconds=0.040)
            assert report is not None
            rig.scheduler.on_report("w", report, rig.now)
        return rig.scheduler.level_quanta()[0]

    assert first_quantum() == 0.040
    assert first_quantum(quantum_s=0.010) == 0.010


def test_a_short_quantum_sinks_jobs_faster() -> None:
    def level(**config: Any) -> int:
        rig = Rig({"policy": "mlfq", **config})
        rig.submit("a", max_tokens=30)
        rig.run(8)
        return rig.job("a").level

    assert level(quantum_s=0.001) > level() > level(quantum_s=0.5) == 0
    assert level(levels=2) == 1
    assert level(quantum_ratio=1.1) > level()


def test_demotion_by_use_or_by_one_level() -> None:
    """A prefill of 140 ms uses three quanta up, 10, 20 and 40 ms, and 70 ms of the next."""

    def after_a_prefill(**config: Any) -> tuple[int, float]:
        rig = Rig({"policy": "mlfq", **config})
        rig.submit("a", prompt=16)
        rig.plan()
        report = rig.worker.step(seconds=0.140)
        assert report is not None
        rig.scheduler.on_report("w", report, rig.now)
        return rig.job("a").level, rig.job("a").used

    level, used = after_a_prefill(quantum_s=0.010)
    assert level == 3 and used == pytest.approx(0.070)
    assert after_a_prefill(quantum_s=0.010, demotion="one-level") == (1, 0.0)


def test_the_last_level_is_the_last_with_either() -> None:
    for demotion in ("as-used", "one-level"):
        rig = Rig({"policy": "mlfq", "demotion": demotion, "levels": 2})
        rig.submit("a", max_tokens=40)
        rig.run(20)
        assert rig.job("a").level == 1


@pytest.mark.parametrize(("alpha", "promotions"), [(math.inf, 0), (0.05, 1), (0.3, 1)])
def test_starvation_threshold(alpha: float, promotions: int) -> None:
    rig = Rig({"policy": "fixed-priority", "starvation_s": alpha}, max_num_seqs=1)
    rig.submit("long", prompt=20, max_tokens=1)
    for number in range(60):
        rig.submit(f"s{number}", prompt=2, max_tokens=1)
        rig.run(1)
        if alpha == 0.3 and number == 28:
            assert not rig.scheduler.counters["promotions"]
    assert rig.scheduler.counters["promotions"] == promotions
    assert (rig.scheduler.job("long") is None) == bool(promotions)


@pytest.mark.parametrize(("share", "lifted"), [(0.25, 1), (0.5, 2), (1.0, 4)])
def test_promotion_share(share: float, lifted: int) -> None:
    rig = Rig(
        {"policy": "fixed-priority", "starvation_s": 0.05, "promotion_share": share},
        max_num_seqs=4,
        device_blocks=400,
    )
    for number in range(16):
        rig.submit(f"a{number}", prompt=2 + number, max_tokens=40)
    rig.run(8)
    assert sum(job.boosted for job in rig.scheduler.jobs()) == lifted


@pytest.mark.parametrize(("look_ahead", "small_runs"), [(1, False), (64, True)])
def test_look_ahead(look_ahead: int, small_runs: bool) -> None:
    """Three jobs that do not fit come first, then one that does."""
    rig = Rig({"policy": "fcfs", "look_ahead": look_ahead}, device_blocks=16)
    rig.submit("running", prompt=36, max_tokens=20)
    rig.run(2)
    for number in range(3):
        rig.submit(f"large{number}", prompt=40, max_tokens=8)
    rig.submit("small", max_tokens=1)
    assert ("small" in rig.run(2)) is small_runs


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_partial_prefills(limit: int) -> None:
    rig = Rig({"max_partial_prefills": limit}, max_num_batched_tokens=16, device_blocks=64)
    for name in "abcd":
        rig.submit(name, prompt=40)
    assert len(rig.rows()) == limit


@pytest.mark.parametrize(("blocks", "left"), [(0, 0), (None, 1), (8, 1), (16, 2)])
def test_idle_reserve(blocks: int | None, left: int) -> None:
    """Two jobs wait on a device of 32 blocks, of which few are free: how many leave for it?"""
    rig = Rig(
        {"policy": "fixed-priority", "kv_reserve_blocks": blocks},
        max_num_seqs=1,
        device_blocks=32,
        max_model_len=128,
    )
    for name, prompt in (("a", 40), ("b", 36), ("c", 32)):
        rig.submit(name, prompt=prompt, max_tokens=20)
        rig.run(6)
    offloaded = {name for kind, name in rig.ops if kind is KvOpKind.OFFLOAD}
    assert len(offloaded) == left, rig.ops


@pytest.mark.parametrize("strategy", ["proactive", "reactive", "recompute", "defer"])
def test_kv_strategy(strategy: str) -> None:
    """A newcomer that comes first by priority finds the device full."""
    rig = Rig({"policy": "mlfq", "kv_strategy": strategy}, device_blocks=16)
    rig.submit("long", prompt=36, max_tokens=20)
    rig.run(8)
    rig.submit("new", prompt=30, max_tokens=2, priority=-1)
    rig.run(1)
    kinds = {kind for kind, name in rig.ops if name == "long"}
    expected = {
        "proactive": {KvOpKind.OFFLOAD},
        "reactive": {KvOpKind.OFFLOAD},
        "recompute": {KvOpKind.DROP_DEVICE},
        "defer": set(),
    }
    assert kinds == expected[strategy]
    assert (rig.job("long").kv is KvState.DEVICE) == (strategy == "defer")
    assert sorted(rig.run(120)) == ["long", "new"]


@pytest.mark.parametrize(
    "change",
    [
        {"quantum_s": 0.0},
        {"quantum_s": math.inf},
        {"demotion": "gently"},
        {"kv_strategy": "hope"},
        {"kv_reserve_blocks": -1},
        {"look_ahead": 0},
        {"max_partial_prefills": 0},
        {"promotion_share": 1.5},
    ],
)
def test_options_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        SchedulerConfig(**change)
