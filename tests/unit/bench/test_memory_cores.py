"""Deployments that run at once, by turns on each other's cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fastserve.bench.arrivals import LoadError
from fastserve.bench.memory import cores
from support.waiting import eventually

_FAMILY = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"


@pytest.fixture
def families() -> Iterator[list[int]]:
    """Two processes with a child each."""
    command = [sys.executable, "-c", _FAMILY]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(2)]
    yield [process.pid for process in started]
    for process in started:
        assert process.stdin is not None
        process.stdin.close()  # ends the child
        process.wait(20)


def _where(pid: int) -> set[frozenset[int]]:
    """The cores of a process and of all that it started."""
    import psutil

    everyone = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return {frozenset(os.sched_getaffinity(one.pid)) for one in everyone}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
async def test_each_has_every_core_in_turn_with_its_children(
    families: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "_TURN_S", 0.05)
    own = cores.shares(2)
    first, second = (frozenset(share) for share in own)
    assert not first & second
    here = [{first}, {second}]

    async with cores.in_turns(families, own):
        for wanted in (here[::-1], here, here[::-1]):
            await eventually(lambda w=wanted: [_where(pid) for pid in families] == w, "a turn")  # type: ignore[misc]
    assert [_where(pid) for pid in families] == here


def test_too_few_cores_are_an_error() -> None:
    with pytest.raises(LoadError, match="--only"):
        cores.shares(len(os.sched_getaffinity(0)) + 1)
