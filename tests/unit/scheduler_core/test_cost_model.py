"""Iteration times, predicted and learned."""

from __future__ import annotations

import random

import pytest

from fastserve.scheduler.core import CostSample, RowResult
from fastserve.scheduler.core.cost_model import CostModel, Work, chunk, work_of
from support.scheduler_rig import Rig

DECODE_S, TOKEN_S = 0.010, 0.002
PREFILL = CostSample(1, 101, 101, DECODE_S + 100 * TOKEN_S)
DECODE = CostSample(1, 1, 100, DECODE_S)
ONE_DECODE = Work(0, 0, 1, 100)


def test_the_work_of_rows() -> None:
    rows = [RowResult("a", 1, 50), RowResult("b", 4, 10), RowResult("c", 1, 7)]
    # The chunk of b: tokens 7, 8, 9, 10 attend to as many.
    assert work_of(rows) == Work(4, 7 + 8 + 9 + 10, 2, 57)
    assert chunk(6, 4) == Work(4, 34, 0, 0)


def test_the_model_begins_with_the_two_samples() -> None:
    cost = CostModel(PREFILL, DECODE)
    assert cost.decode_s == DECODE_S
    assert cost.seconds(ONE_DECODE) == pytest.approx(DECODE_S)
    assert cost.seconds(chunk(0, 101)) == pytest.approx(PREFILL.seconds)
    # Two chunks: the fixed part of an iteration once more.
    assert cost.prefill(101, 51) == pytest.approx(PREFILL.seconds + DECODE_S - TOKEN_S)


def test_the_model_learns_what_each_kind_of_work_costs() -> None:
    cost = CostModel(PREFILL, DECODE)

    def truth(work: Work) -> float:
        tokens = work.prefill_tokens * 1e-4 + work.attention * 1.4e-8
        return 0.02 + tokens + work.rows * 4e-5 + work.context * 6e-7

    seen = random.Random(1)
    for _ in range(600):
        rows, context = seen.randint(1, 64), seen.randint(20, 1000)
        work = Work(0, 0, rows, rows * context)
        if seen.random() < 0.3:
            work = chunk(0, seen.randint(2, 2000))._replace(rows=work.rows, context=work.context)
        cost.observe(work, truth(work) * seen.uniform(0.98, 1.02))
    for work in (Work(0, 0, 64, 40_000), Work(0, 0, 1, 900), chunk(0, 1500), chunk(500, 500)):
        assert cost.seconds(work) == pytest.approx(truth(work), rel=0.06)
    assert 0 < cost.error < 0.03


def test_the_error_tells_when_predictions_are_off() -> None:
    cost = CostModel(PREFILL, DECODE)
    cost.observe(ONE_DECODE, 10 * DECODE_S)
    assert cost.error == pytest.approx(0.05 * 0.9)


def test_one_hiccup_moves_neither_the_median_nor_the_model_much() -> None:
    cost = CostModel(PREFILL, DECODE)
    for n in range(200):
        cost.observe(ONE_DECODE, DECODE_S * (1.01 if n % 2 else 0.99))
    before = cost.seconds(chunk(0, 100))
    cost.observe(ONE_DECODE, 5.0)
    assert cost.decode_s == pytest.approx(DECODE_S, rel=0.02)
    assert cost.seconds(ONE_DECODE) < 2 * DECODE_S
    assert cost.seconds(chunk(0, 100)) < 2 * before


@pytest.mark.parametrize("policy", ["fastserve", "skip-join-mlfq"])
@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_prediction_off_by_ten_costs_efficiency_only(policy: str, factor: float) -> None:
    rig = Rig({"policy": policy}, max_num_seqs=2)
    group = rig.scheduler._groups["w"]
    group.cost = group.policy.cost = _Off(group.info.prefill_sample, group.info.decode_sample)
    group.policy.cost.factor = factor
    for number in range(8):
        assert rig.submit(f"j{number}", prompt=2 + 5 * number, max_tokens=12) is None
    assert sorted(rig.run(150)) == [f"j{number}" for number in range(8)]


class _Off(CostModel):
    factor = 1.0

    def seconds(self, work: Work) -> float:
        return self.factor * super().seconds(work)
