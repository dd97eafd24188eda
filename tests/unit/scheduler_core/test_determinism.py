"""The same events make the same decisions, bit for bit: in one process and in any other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastserve.scheduler.core.policies import POLICIES
from support.random_load import decisions

_TESTS = Path(__file__).parents[2]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_same_events_make_the_same_decisions(policy: str) -> None:
    assert decisions(policy, 3) == decisions(policy, 3)
    assert decisions(policy, 3) != decisions(policy, 4)


def test_no_decision_depends_on_the_hashes_of_a_process() -> None:
    policies = sorted(POLICIES)
    here = [decisions(policy, 7) for policy in policies]
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-m", "support.random_load", *policies],
            cwd=_TESTS,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert there.stdout.split() == here
