"""No job waits without bound: a long job gets through an endless stream of short ones."""

from __future__ import annotations

from collections import deque

import pytest

from fastserve.scheduler.core.policies import POLICIES
from support.scheduler_rig import Rig

_STREAM = 3000  # iterations in which new short jobs never stop to come: 30 s


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"srpt"}))
def test_a_long_job_ends_while_short_ones_keep_coming(name: str) -> None:
    """Two rows; every iteration brings a short job while fewer than 8 are there, and the long job
    has the longest prompt and the longest output."""
    assert "long" in _ended(name)


def test_srpt_starves_long_jobs() -> None:
    """It is an oracle to compare with, not for serving: this shows that the test above can fail."""
    assert "long" not in _ended("srpt")


def _ended(name: str) -> set[str]:
    rig = Rig(
        {"policy": name, "starvation_s": 0.5, "max_queued_jobs": 1000},
        max_num_seqs=2,
        max_model_len=64,
    )
    short: deque[str] = deque()
    ended: set[str] = set()
    for number in range(_STREAM):
        if number == 20:
            assert rig.submit("long", prompt=24, max_tokens=30) is None
        if len(short) < 8:
            assert rig.submit(f"s{number}", prompt=2, max_tokens=4) is None
            short.append(f"s{number}")
        for job_id in rig.run():
            ended.add(job_id)
            if job_id in short:
                short.remove(job_id)
        if "long" in ended:
            break
    return ended
