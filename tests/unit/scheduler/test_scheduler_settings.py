from __future__ import annotations

import pytest

from fastserve.common.errors import StartupError
from fastserve.common.settings import load_settings
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
    assert settings.worker == ["unix:/run/w0.sock", "127.0.0.1:7071"]
    config = core_config(settings)
    assert (config.policy, config.lease, config.starvation_s) == ("fcfs", 2, 1.5)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (3, 99)
    assert config.max_queued_jobs == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--worker", "unix:/run/w0.sock"], "given twice"),
        (["--shard", "a{b}"], "shard"),
        (["--lease", "0"], "lease"),
        (["--redis-timeout", "0"], "redis_timeout"),
    ],
)
def test_wrong_settings_are_one_sentence(flags: list[str], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        load(*flags)


def test_worker_and_redis_must_be_given() -> None:
    with pytest.raises(StartupError, match=r"worker.*redis_url"):
        load_settings(SchedulerSettings, "fastserve-scheduler", [])


def test_the_password_of_redis_is_not_logged() -> None:
    settings = load("--redis-url", "redis://user:secret@host/0")
    assert "secret" not in str(settings.effective())
