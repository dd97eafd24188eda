from __future__ import annotations

import dataclasses
import math

import pytest

from fastserve.common.errors import StartupError
from fastserve.common.settings import load_settings
from fastserve.scheduler.core import Demotion, KvStrategy, PrefixCache, SchedulerConfig
from fastserve.scheduler.leader import core_config
from fastserve.scheduler.settings import SchedulerSettings

NEEDED = ["--worker", "unix:/run/w0.sock", "--redis-url", "redis://localhost:6379/0"]


def load(*flags: str) -> SchedulerSettings:
    return load_settings(SchedulerSettings, "fastserve-scheduler", [*NEEDED, *flags])


def test_flags_reach_the_core() -> None:
    settings = load(
        *("--worker", "127.0.0.1:7071", "--policy", "fcfs", "--max-num-seqs", "3"),
        *("--max-num-batched-tokens", "99", "--max-num-queued-reqs", "7", "--lease", "2"),
        *("--starvation-threshold", "1.5"),
    )
    assert settings.workers == ["unix:/run/w0.sock", "127.0.0.1:7071"]
    config = core_config(settings)
    assert (config.policy, config.lease, config.starvation_s) == ("fcfs", 2, 1.5)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (3, 99)
    assert config.max_queued_jobs == 7


def test_every_option_of_the_core_is_a_setting() -> None:
    config = core_config(
        load(
            *("--policy", "mlfq", "--max-num-seqs", "3", "--max-num-batched-tokens", "99"),
            *("--max-num-queued-reqs", "7", "--lease", "2", "--max-num-partial-prefills", "5"),
            *("--look-ahead", "6", "--levels", "8", "--quantum", "0.02", "--quantum-ratio", "3"),
            *("--demotion", "one-level", "--starvation-threshold", "inf"),
            *("--promotion-share", "0.5", "--kv-strategy", "reactive"),
            *("--kv-reserve-blocks", "12", "--fair-sharing", "off", "--kv-write-through", "off"),
            *("--prefix-cache", "all"),
        )
    )
    for field in dataclasses.fields(SchedulerConfig):
        assert getattr(config, field.name) != field.default, field.name
    assert (config.quantum_s, config.kv_reserve_blocks) == (0.02, 12)
    assert not config.kv_write_through and config.prefix_cache is PrefixCache.ALL
    assert (config.max_partial_prefills, config.starvation_s) == (5, math.inf)
    assert config.demotion is Demotion.ONE_LEVEL and config.kv_strategy is KvStrategy.REACTIVE


def test_what_is_not_set_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert core_config(load()) == SchedulerConfig()
    assert core_config(load("--quantum", "measured", "--kv-reserve-blocks", "auto")) == (
        SchedulerConfig()
    )
    monkeypatch.setenv("FASTSERVE_KV_RESERVE_BLOCKS", "auto")
    monkeypatch.setenv("FASTSERVE_FAIR_SHARING", "off")
    monkeypatch.setenv("FASTSERVE_DEMOTION", "one-level")
    config = core_config(load())
    assert (config.kv_reserve_blocks, config.fair_sharing) == (None, False)
    assert config.demotion is Demotion.ONE_LEVEL


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--worker", "unix:/run/w0.sock"], "given twice"),
        (["--shard", "a{b}"], "shard"),
        (["--lease", "0"], "lease"),
        (["--redis-timeout", "0"], "redis_timeout"),
        (["--quantum", "0"], "quantum"),
        (["--quantum", "inf"], "quantum"),
        (["--quantum-ratio", "1"], "quantum_ratio"),
        (["--levels", "65"], "levels"),
        (["--demotion", "gently"], "demotion"),
        (["--promotion-share", "0"], "promotion_share"),
        (["--kv-strategy", "hope"], "kv_strategy"),
        (["--kv-reserve-blocks", "-1"], "kv_reserve_blocks"),
        (["--kv-reserve-blocks", "some"], "kv_reserve_blocks"),
        (["--max-num-partial-prefills", "0"], "max_num_partial_prefills"),
        (["--look-ahead", "0"], "look_ahead"),
        (["--fair-sharing", "maybe"], "fair_sharing"),
        (["--prefix-cache", "on"], "prefix_cache"),
    ],
)
def test_wrong_settings_are_one_sentence(flags: list[str], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        load(*flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--worker", "w:1"], "redis_url"),
        (["--redis-url", "redis://r"], "no worker group is given"),
        (["--redis-url", "redis://r", "--discovery", "dns"], "no worker group is given"),
        (["--redis-url", "redis://r", "--discovery", "dns", "--worker", "w"], "a name and a port"),
        (["--redis-url", "redis://r", "--discovery", "kubernetes"], "needs --kubernetes-service"),
        (
            [
                *("--redis-url", "redis://r", "--discovery", "kubernetes"),
                *("--kubernetes-service", "w", "--worker", "w:1"),
            ],
            "does not go with",
        ),
        (["--redis-url", "redis://r", "--discovery", "gossip"], "discovery"),
    ],
)
def test_what_must_be_given(flags: list[str], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        load_settings(SchedulerSettings, "fastserve-scheduler", flags)


def test_workers_by_environment_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_WORKERS", "w-0:7071, w-1:7071")
    monkeypatch.setenv("FASTSERVE_REDIS_URL", "redis://r")
    settings = load_settings(SchedulerSettings, "fastserve-scheduler", [])
    assert (settings.discovery, settings.workers) == ("static", ["w-0:7071", "w-1:7071"])
    monkeypatch.delenv("FASTSERVE_WORKERS")
    monkeypatch.setenv("FASTSERVE_DISCOVERY", "kubernetes")
    monkeypatch.setenv("FASTSERVE_KUBERNETES_SERVICE", "workers")
    monkeypatch.setenv("FASTSERVE_KUBERNETES_NAMESPACE", "llm")
    settings = load_settings(SchedulerSettings, "fastserve-scheduler", [])
    assert (settings.kubernetes_service, settings.kubernetes_namespace) == ("workers", "llm")


def test_the_password_of_redis_is_not_logged() -> None:
    settings = load("--redis-url", "redis://user:secret@host/0")
    assert "secret" not in str(settings.effective())
