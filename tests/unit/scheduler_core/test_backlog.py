"""The seconds of work that wait, which autoscalers act on."""

from __future__ import annotations

import pytest

from fastserve.scheduler.core import JobState
from fastserve.scheduler.core.cost_model import Work, chunk
from support.scheduler_rig import Rig

DECODE_S = 0.010


def rig(rows: int = 2, budget: int = 512) -> Rig:
    """Decodes take 10 ms; what a prompt token adds is known."""
    made = Rig(
        {"policy": "fcfs"},
        max_num_seqs=rows,
        max_num_batched_tokens=budget,
        device_blocks=400,
        max_model_len=800,
    )
    cost = made.scheduler.cost_model("w")
    for number in range(100):
        cost.observe(Work(0, 0, 1, number), DECODE_S)
    return made


def test_nothing_waits() -> None:
    idle = rig()
    assert idle.scheduler.queued_work_s("w") == 0.0
    idle.submit("a", max_tokens=50)
    idle.run(2)
    assert idle.scheduler.queued_work_s("w") == 0.0, "a job with a row does not wait"


def test_decodes_run_side_by_side_and_prefills_do_not() -> None:
    two, four = rig(rows=2), rig(rows=4)
    for made in (two, four):
        for job in range(3):
            made.submit(f"j{job}", prompt=100, max_tokens=100)
    prefill = 3 * two.scheduler.cost_model("w").more(0, 100)
    assert prefill == pytest.approx(
        3 * (two.scheduler.cost_model("w").seconds(chunk(0, 100)) - _base(two))
    )
    assert two.scheduler.queued_work_s("w") == pytest.approx(prefill + 3 * 100 * DECODE_S / 2)
    assert four.scheduler.queued_work_s("w") == pytest.approx(prefill + 3 * 100 * DECODE_S / 4)


def _base(made: Rig) -> float:
    return made.scheduler.cost_model("w").seconds(Work(0, 0, 0, 0))


def test_an_answer_is_expected_to_take_what_others_took() -> None:
    made = rig(rows=1)
    for number in range(300):  # the mean of those that ended forgets slowly
        made.submit(f"short{number}", prompt=1, max_tokens=700, length=5)
        made.run(6)
    made.submit("running", prompt=1, max_tokens=700)
    made.run(2)
    made.submit("next", prompt=1, max_tokens=700)
    assert made.scheduler.queued_work_s("w") < 100 * DECODE_S


def test_a_preempted_job_counts_with_what_is_left() -> None:
    made = Rig({"policy": "mlfq"}, max_num_seqs=1, device_blocks=400, max_model_len=800)
    made.submit("long", prompt=4, max_tokens=100)
    fresh = made.scheduler.queued_work_s("w")
    made.run(60)
    made.submit("urgent", max_tokens=100, priority=-1)
    made.run(2)
    assert made.job("long").state is JobState.PREEMPTED
    assert 0 < made.scheduler.queued_work_s("w") < fresh
