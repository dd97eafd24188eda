"""Jobs that begin with KV that was there already: less to compute, less charged, nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.scheduler.core import JobSpec, PrefixCache, ProtocolError, Report, SchedulerConfig
from support.scheduler_rig import Rig


def counted(rig: Rig, name: str) -> int:
    return rig.scheduler.counters[f"tokens.{name}"]


def test_what_the_cache_had_is_known_and_not_charged() -> None:
    def begun(cached: int) -> Rig:
        rig = Rig()
        rig.submit("a", prompt=14, cached=cached)
        rig.plan()
        report = rig.worker.step(seconds=0.030 if cached == 0 else 0.012)
        assert report is not None
        rig.scheduler.on_report("w", report, rig.now)
        rig.scheduler.check_integrity()
        return rig

    plain, saved = begun(0), begun(9)
    assert (plain.job("a").cached, saved.job("a").cached) == (0, 8)
    for rig in (plain, saved):
        assert (rig.job("a").computed, rig.job("a").output != []) == (14, True)
        assert counted(rig, "recomputed") == 0
    assert (counted(plain, "cached"), counted(saved, "cached")) == (0, 8)
    assert saved.job("a").attained < plain.job("a").attained


def test_a_prompt_of_several_iterations_takes_what_is_left_of_it() -> None:
    rig = Rig({"lease": 1}, device_blocks=20)
    rig.submit("a", prompt=40, cached=30)
    assert rig.rows() == [("a", 16)]
    rig.step()
    assert (rig.job("a").computed, len(rig.job("a").output)) == (40, 1)
    assert rig.rows() == [("a", 1)]
    assert rig.run(20) == ["a"]


def test_blocks_are_booked_as_if_nothing_was_shared() -> None:
    rig = Rig(device_blocks=8)
    rig.submit("a", prompt=16, cached=16)
    rig.submit("b", prompt=16, cached=16)
    rig.run(1)
    assert rig.job("a").booked + rig.job("b").booked <= 8
    assert rig.job("a").booked >= 5


def test_computing_again_is_no_saving_of_the_request() -> None:
    rig = Rig({"lease": 1})
    rig.submit("a", prompt=14)
    rig.run(3)
    known = rig.job("a").known_len
    rig.cached["a"] = 12
    inventory = rig.worker.reconnect(died=True)
    rig.scheduler.remove_worker("w", rig.now)
    rig.scheduler.add_worker(rig.info, inventory, rig.now)
    rig.run(1)
    assert (rig.job("a").cached, counted(rig, "cached")) == (0, 0)
    assert counted(rig, "recomputed") == known - 1 - 12
    assert rig.run(20) == ["a"]


def test_a_cache_with_more_than_the_job_may_have_is_a_lie() -> None:
    rig = Rig()
    rig.submit("a", prompt=4, max_tokens=8)
    rig.plan()
    with pytest.raises(ProtocolError, match="12 tokens in the cache for job a"):
        rig.scheduler.on_report("w", Report(0, 0, cached=[("a", 12)]), rig.now)
    rig.scheduler.on_report("w", Report(0, 0, cached=[("stranger", 12)]), rig.now)


@pytest.mark.parametrize(
    ("value", "salt"), [("off", b""), ("tenant", b"tenant:acme"), ("all", b"all")]
)
def test_the_option(value: Any, salt: bytes) -> None:
    config = SchedulerConfig(prefix_cache=value)
    assert config.prefix_cache is PrefixCache(value)
    assert config.prefix_cache.salt(JobSpec("a", (1,), 1, 0.0, tenant="acme")) == salt


def test_an_unknown_value_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of off, tenant, all"):
        SchedulerConfig(prefix_cache="some")  # type: ignore[arg-type]
