"""A worker group that is much slower than others is named, once."""

from __future__ import annotations

import pytest

from fastserve.scheduler.core import CostModel, CostSample
from fastserve.scheduler.core.cost_model import Work
from fastserve.scheduler.slow import Slowness


def model(seconds: float, rows: int = 8) -> CostModel:
    """Of a worker whose iterations of so many decodes take so long."""
    cost = CostModel(CostSample(1, 64, 64, 0.1), CostSample(1, 1, 64, seconds))
    for _ in range(100):
        cost.observe(Work(0, 0, rows, 64 * rows), seconds)
    return cost


def test_a_slow_group_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    slowness = Slowness()
    fast, slow = model(0.01), model(0.1, rows=2)
    for _ in range(3):
        ratios = slowness.compare({"fast": fast, "slow": slow})
    assert ratios == {"fast": 1.0, "slow": pytest.approx(10.0)}
    log = capsys.readouterr().out
    assert log.count("a worker is slow") == 1 and "worker=slow" in log
    slowness.compare({"fast": fast, "slow": model(0.035)})  # hardly better
    assert "no longer" not in capsys.readouterr().out
    slowness.compare({"fast": fast, "slow": model(0.02)})
    assert "no longer slow" in capsys.readouterr().out


def test_what_explains_itself_is_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    """More rows take longer, a group may be smaller, and one alone has nothing to compare with."""
    slowness = Slowness()
    assert slowness.compare({"busy": model(0.1, rows=32), "idle": model(0.01, rows=1)}) == {
        "busy": 1.0,
        "idle": 1.0,
    }
    slowness.compare({"large": model(0.01), "small": model(0.025)})
    assert slowness.compare({"alone": model(9.0)}) == {"alone": 1.0}
    assert slowness.compare({}) == {}
    assert "slow" not in capsys.readouterr().out
