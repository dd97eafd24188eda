"""No job waits without bound: long jobs get through an endless stream of short ones, each within a
time that follows from the rules of the policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from fastserve.scheduler.core import EventKind, Job
from fastserve.scheduler.core.policies import POLICIES, Key
from fastserve.scheduler.core.policies.base import Handicap
from fastserve.scheduler.core.policies.fastserve import FastServe
from fastserve.scheduler.core.policies.fcfs import Fcfs
from fastserve.scheduler.core.policies.hrrn import Hrrn
from fastserve.scheduler.core.policies.mlfq import Mlfq
from support.scheduler_rig import Rig

BOUNDED = sorted(set(POLICIES) - {"srpt"})

ROWS = 2
SHORT, LONG = (2, 4), (24, 30)  # tokens of prompt and output
SHORTS, LONGS = 8, 2  # that many are always there: three times what two rows can serve at once
ITERATION_S = 0.010
THRESHOLD_S = 0.5
LIFTED = 1  # jobs at a time, of two rows
_WARM_UP = {"fastserve": 1000}  # iterations until it has learnt how much an average job takes
_STREAM = 3000  # iterations that count, 30 s
# The head start of newcomers alone is a minute.
_STREAMS = {"fastserve": 14_000}


def _iterations(prompt: int, output: int) -> int:
    """Of a job that has a row all the time: a row beside it takes a token or two of the 16."""
    return -(-prompt // 14) + output - 1


# Of all that can be there, each with its whole work before it.
_WORK = SHORTS * _iterations(*SHORT) + LONGS * _iterations(*LONG)
# A second prompt that needs several iterations waits for the first, and whoever is behind may pass.
_PASSES = LONGS * _iterations(LONG[0], 1)


@dataclass
class Load:
    """What was seen of a stream, in seconds."""

    waits: dict[str, float] = field(default_factory=dict)  # job -> its longest
    spread: float = 0.0  # FastServe: most that a later arrival was worth
    prefill: tuple[float, float] = (math.inf, 0.0)  # HRRN: the least and most predicted


def _stream(policy: str) -> Load:
    rig = Rig(
        {"policy": policy, "starvation_s": THRESHOLD_S, "promotion_share": LIFTED / ROWS},
        max_num_seqs=ROWS,
        device_blocks=256,
    )
    load, since = Load(), dict[str, float]()
    warm_up = _WARM_UP.get(policy, 0)
    for number in range(warm_up + _STREAMS.get(policy, _STREAM)):
        counts = number >= warm_up
        live = [job.job_id for job in rig.scheduler.jobs()]
        for kind, shape, most in (("long", LONG, LONGS), ("short", SHORT, SHORTS)):
            if counts or kind == "short":
                for place in range(most - sum(job_id.startswith(kind) for job_id in live)):
                    assert rig.submit(f"{kind}-{number}.{place}", *shape) is None
        rig.run()
        events = rig.scheduler.drain_events()
        if not counts:
            continue
        _look(load, list(rig.scheduler.jobs()), rig.scheduler._groups["w"].policy.key)
        for event in events:
            if event.kind in (EventKind.QUEUED, EventKind.PREEMPTED):
                since[event.job_id] = event.now
            elif event.kind is EventKind.STARTED and event.job_id in since:
                _note(load, event.job_id, event.now - since.pop(event.job_id))
    for job_id, moment in since.items():
        _note(load, job_id, rig.now - moment)
    return load


def _note(load: Load, job_id: str, waited: float) -> None:
    load.waits[job_id] = max(waited, load.waits.get(job_id, 0.0))


def _look(load: Load, jobs: Iterable[Job], key: Callable[[Job], Key]) -> None:
    offsets = [key(job)[1] - job.spec.arrival for job in jobs]
    load.spread = max(load.spread, max(offsets) - min(offsets))
    limits = [job.limit for job in jobs if job.limit]
    load.prefill = min([load.prefill[0], *limits]), max([load.prefill[1], *limits])


# --- bounds, in seconds -----------------------------------------------------------------------


def _fcfs(load: Load) -> float:
    """Both rows are with jobs that came earlier, and each of those goes on to its end."""
    return (_WORK / ROWS + _PASSES) * ITERATION_S


def _hrrn(load: Load) -> float:
    """After a wait of `w`, only those pass that waited `r w` themselves, `r` being the ratio of the
    predicted prefills. All of these were there `r w` ago already; so they have `r w` of work at
    the most. Ratios are those of the last sort."""
    least, most = load.prefill
    return _fcfs(load) * most / least + Hrrn.resort_s


def _lifts(each: int, of_long: int) -> float:
    """At the threshold all others may have waited for longer still; they are lifted first, and
    each lift lasts so many iterations."""
    return THRESHOLD_S + (SHORTS * each + LONGS * of_long) / LIFTED * ITERATION_S


def _mlfq(load: Load) -> float:
    """A lift lasts for the quantum of the first level, which is a decode iteration as measured, so
    one that was a little faster does not use it up."""
    return _lifts(2, 2)


def _fixed_priority(load: Load) -> float:
    """A lift lasts to the end of the job."""
    return _lifts(_iterations(*SHORT), _iterations(*LONG)) + _PASSES * ITERATION_S


def _fastserve(load: Load) -> float:
    """Whoever comes later than a job's own key, or `spread` later than the job, stays behind it;
    what was there before has its whole work to do at the most."""
    return load.spread + _fcfs(load)


_BOUNDS: dict[str, Callable[[Load], float]] = {
    "fcfs": _fcfs,
    "hrrn": _hrrn,
    "mlfq": _mlfq,
    "skip-join-mlfq": _mlfq,
    "fixed-priority": _fixed_priority,
    "fastserve": _fastserve,
}


def _check(policy: str) -> None:
    load = _stream(policy)
    bound = _BOUNDS[policy](load) + ITERATION_S  # begins before a plan, ends with one
    seconds = _STREAMS.get(policy, _STREAM) * ITERATION_S
    assert bound < seconds / 2, "the stream is too short to show anything"
    longest = max(load.waits, key=lambda job_id: load.waits[job_id])
    assert load.waits[longest] <= bound, f"{longest} waited longer than {bound:.2f} s"


@pytest.mark.parametrize("policy", BOUNDED)
def test_a_long_job_ends_where_memory_is_scarce_too(policy: str) -> None:
    """It needs 14 of 16 blocks in the end, and short ones hold 2 each."""
    rig = Rig({"policy": policy, "starvation_s": THRESHOLD_S}, max_num_seqs=ROWS, device_blocks=16)
    ended: list[str] = []
    for number in range(_STREAM):
        if number == 20:
            assert rig.submit("long", *LONG) is None
        if len(list(rig.scheduler.jobs())) < SHORTS:
            assert rig.submit(f"short-{number}", *SHORT) is None
        ended += rig.run()
        if "long" in ended:
            return
    raise AssertionError("it never ended")


@pytest.mark.parametrize("policy", BOUNDED)
def test_no_job_waits_longer_than_the_rules_allow(policy: str) -> None:
    _check(policy)


# --- the test above can fail ------------------------------------------------------------------


def test_srpt_starves_long_jobs() -> None:
    """It is an oracle to compare with, not for serving."""
    waits = _stream("srpt").waits
    assert max(waits[job_id] for job_id in waits if job_id.startswith("long")) > 20.0


class _NeverLifts(Mlfq):
    def promote(self, job: Job, now: float) -> bool:
        return False


class _LiftsForEver(Mlfq):
    """Who was lifted once counts for good, and the share is used up."""

    def settle(self, job: Job) -> None:
        job.boosted = False


class _NewestFirst(Fcfs):
    def key(self, job: Job) -> Key:
        return (job.state != "running", -job.seq)


class _ShortestFirst(Hrrn):
    def key(self, job: Job) -> Key:
        return (job.state != "running", job.limit, job.seq)


class _LevelsAsWalls(FastServe):
    def worth(self, handicap: Handicap) -> float:
        return 1e6 * float(handicap[0])


class _LevelsFirst(FastServe):
    def rank(self, job: Job) -> tuple[float, float, float]:
        return (job.level, job.spec.arrival, job.place)


@pytest.mark.parametrize(
    "broken",
    [_NeverLifts, _LiftsForEver, _NewestFirst, _ShortestFirst, _LevelsAsWalls, _LevelsFirst],
)
def test_a_broken_policy_is_found_out(broken: type[Mlfq], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, broken.name, broken)
    with pytest.raises(AssertionError, match=r"waited longer|too short"):
        _check(broken.name)
