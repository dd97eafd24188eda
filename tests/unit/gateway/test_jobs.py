"""Packed batches come apart as they were packed; a job takes each token once, in order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.gateway.jobs import (
    UNFINISHED,
    Entry,
    Job,
    JobRefusedError,
    SchedulerLostError,
    TokenLogprob,
    unpack,
)
from fastserve.proto.v1 import sampling_pb2, scheduler_pb2

STOP = sampling_pb2.FINISH_REASON_STOP
FAILED = sampling_pb2.FINISH_REASON_FAILED
CANCELLED = sampling_pb2.FINISH_REASON_CANCELLED

UINT32 = st.integers(0, 2**32 - 1)
LOGPROBS = st.floats(-100, 0, width=32)
SCORES = st.lists(st.tuples(UINT32, LOGPROBS), max_size=3).flatmap(
    lambda top: LOGPROBS.map(
        lambda logprob: TokenLogprob(logprob, [token for token, _ in top], [lp for _, lp in top])
    )
)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    tokens = draw(st.lists(UINT32, max_size=5))
    scored = draw(st.booleans())
    finish = draw(st.sampled_from(sampling_pb2.FinishReason.values()))
    return Entry(
        draw(st.integers(0, 2**64 - 1)),
        draw(UINT32),
        tokens,
        [draw(SCORES) for _ in tokens] if scored else None,
        finish,
        draw(st.text(min_size=1)) if finish == FAILED else "",
        draw(UINT32),
    )


def pack(packed: Sequence[Entry]) -> scheduler_pb2.TokenBatch:
    """As the scheduler packs, seen over the wire."""
    batch = scheduler_pb2.TokenBatch()
    for at, entry in enumerate(packed):
        batch.handles.append(entry.handle)
        batch.first_indexes.append(entry.first_index)
        batch.token_counts.append(len(entry.tokens))
        batch.finish_reasons.append(cast(sampling_pb2.FinishReason, entry.finish))
        batch.tokens.extend(entry.tokens)
        batch.has_logprobs.append(int(entry.logprobs is not None))
        for score in entry.logprobs or ():
            batch.logprobs.append(score.logprob)
            batch.top_counts.append(len(score.top_ids))
            batch.top_ids.extend(score.top_ids)
            batch.top_logprobs.extend(score.top_logprobs)
        if entry.error:
            batch.error_entries.append(at)
            batch.errors.append(entry.error)
        if entry.cached:
            batch.cached_entries.append(at)
            batch.cached_tokens.append(entry.cached)
    return scheduler_pb2.TokenBatch.FromString(batch.SerializeToString())


@given(packed=st.lists(entries(), max_size=6))
def test_a_batch_comes_apart_as_it_was_packed(packed: list[Entry]) -> None:
    assert list(unpack(pack(packed))) == packed


def test_entries_with_and_without_logprobs_in_one_batch() -> None:
    scores = [TokenLogprob(-0.5, [7, 8], [-0.5, -1.0]), TokenLogprob(-2.0, [], [])]
    more = [TokenLogprob(-1.5, [9], [-1.5])]
    packed = [
        Entry(1, 0, [7, 6], scores, UNFINISHED, ""),
        Entry(2, 4, [5], None, UNFINISHED, ""),
        Entry(3, 0, [], [], STOP, ""),
        Entry(4, 9, [9], more, FAILED, "out of memory"),
    ]
    assert list(unpack(pack(packed))) == packed


def new_job(submit: scheduler_pb2.Submit | None = None) -> tuple[Job, asyncio.Event]:
    wake = asyncio.Event()
    return Job(1, "a", submit or scheduler_pb2.Submit(job_id="a"), wake), wake


def entry(
    first_index: int, *tokens: int, finish: int = UNFINISHED, error: str = "", scored: bool = False
) -> Entry:
    """With `scored`, a token's log-probability is minus its id."""
    logprobs = [TokenLogprob(-float(token), [token], [0.0]) for token in tokens]
    return Entry(1, first_index, list(tokens), logprobs if scored else None, finish, error)


async def test_cached_tokens_come_once_and_stay_known() -> None:
    job, _ = new_job()
    assert job.cached_tokens == 0
    job.deliver(entry(0, 10)._replace(cached=48))
    job.deliver(entry(1, 11))
    assert job.cached_tokens == 48


async def test_tokens_are_taken_once() -> None:
    job, wake = new_job()
    job.deliver(entry(0, 10, 11))
    assert wake.is_set()
    job.deliver(entry(2, 12))
    assert job.take() == ([10, 11, 12], [None, None, None])
    assert job.take() == ([], [])
    job.deliver(entry(3, 13))
    assert job.take() == ([13], [None])
    assert job.next_index == 4
    assert not job.ended


async def test_logprobs_stay_with_their_tokens() -> None:
    job, _ = new_job()
    job.deliver(entry(0, 10, 11, scored=True))
    job.deliver(entry(1, 11, 12))  # replayed without: they are not stored
    job.deliver(entry(1, 11, 12, 13, scored=True))
    tokens, logprobs = job.take()
    assert tokens == [10, 11, 12, 13]
    assert [score and score.logprob for score in logprobs] == [-10.0, -11.0, None, -13.0]


@pytest.mark.parametrize("again", [(0, 10, 11, 12), (1, 11, 12), (0, 10), (2, 12), (0,), (3,)])
async def test_tokens_seen_before_are_skipped(again: tuple[int, ...]) -> None:
    job, _ = new_job()
    job.deliver(entry(0, 10, 11, 12))
    job.take()
    job.deliver(entry(*again))
    assert job.take() == ([], [])
    assert job.next_index == 3


async def test_a_replay_may_end_the_job() -> None:
    job, _ = new_job()
    job.deliver(entry(0, 10, 11))
    job.deliver(entry(0, 10, 11, finish=STOP))
    assert job.take()[0] == [10, 11]
    assert job.ended


@given(
    count=st.integers(0, 20),
    batches=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=12),
)
def test_each_token_once_however_they_come(count: int, batches: list[tuple[int, int]]) -> None:
    """Batches from anywhere in the answer, as replays bring them; gaps are refused."""

    async def play() -> None:
        answer = list(range(100, 100 + count))
        job, _ = new_job()
        taken: list[int] = []
        for start, length in batches:
            first, known = min(start, count), len(taken)
            batch = entry(first, *answer[first : first + length])
            if first > known:
                with pytest.raises(ValueError, match="missing"):
                    job.deliver(batch)
            else:
                job.deliver(batch)
            taken += job.take()[0]
            assert taken == answer[: len(taken)]
            assert job.next_index == len(taken)
            if first <= known:
                assert len(taken) == max(known, first + len(batch.tokens))

    asyncio.run(play())


async def test_a_gap_is_an_error_that_names_what_is_missing() -> None:
    job, _ = new_job()
    job.deliver(entry(0, 10))
    with pytest.raises(ValueError, match="tokens 1 to 2 of a are missing"):
        job.deliver(entry(3, 13, finish=STOP))
    assert job.take()[0] == [10]
    assert job.next_index == 1
    assert not job.ended


async def test_the_submission_is_kept_until_a_token_came() -> None:
    submit = scheduler_pb2.Submit(job_id="a")
    job, _ = new_job(submit)
    assert not job.known
    job.accept()
    job.deliver(entry(0))
    assert job.submit is submit
    job.deliver(entry(0, 10))
    assert job.submit is None
    assert job.known


async def test_a_job_that_is_attached_to_is_known() -> None:
    assert Job(1, "a", None, asyncio.Event()).known


@pytest.mark.parametrize("tokens", [(), (10, 11)])
async def test_finish_comes_with_or_after_the_last_token(tokens: tuple[int, ...]) -> None:
    job, wake = new_job()
    job.deliver(entry(0, *tokens, finish=STOP))
    assert wake.is_set()
    assert job.ended
    assert job.finish == STOP
    assert job.take()[0] == list(tokens)
    assert job.error == ""
    assert job.failure is None


async def test_a_failure_keeps_its_message() -> None:
    job, _ = new_job()
    job.deliver(entry(0, 10, finish=FAILED, error="out of memory"))
    assert (job.finish, job.error) == (FAILED, "out of memory")
    assert job.take()[0] == [10]


async def test_a_dropped_job_takes_its_end_alone() -> None:
    job, wake = new_job()
    job.deliver(entry(0, 10))
    job.take()
    wake.clear()
    job.dropped = True
    job.deliver(entry(1, 11))
    job.deliver(entry(5, 15, finish=CANCELLED))  # nobody minds the gap
    assert job.ended
    assert job.take() == ([], [])
    assert not wake.is_set()


async def test_answers_come_once() -> None:
    job, _ = new_job()
    for _ in range(2):
        job.accept()
    await job.answer
    rejected = scheduler_pb2.Rejected(
        reason=scheduler_pb2.REJECT_REASON_DRAINING, message="not now", retry_after_s=5
    )
    job.fail(JobRefusedError(rejected))
    await job.answer  # still: the refusal came too late
    assert job.failure is None


async def test_refusal() -> None:
    job, wake = new_job()
    rejected = scheduler_pb2.Rejected(
        reason=scheduler_pb2.REJECT_REASON_DRAINING, message="not now", retry_after_s=5
    )
    job.fail(JobRefusedError(rejected))
    assert wake.is_set()
    with pytest.raises(JobRefusedError, match="not now") as refusal:
        await job.answer
    assert refusal.value.reason == scheduler_pb2.REJECT_REASON_DRAINING
    assert refusal.value.retry_after_s == 5
    job.accept()  # too late
    with pytest.raises(JobRefusedError):
        await job.answer


async def test_loss_leaves_what_was_not_taken() -> None:
    job, wake = new_job()
    job.accept()
    job.deliver(entry(0, 10))
    wake.clear()
    job.fail(SchedulerLostError("the scheduler cannot be reached"))
    assert wake.is_set()
    assert job.ended
    assert str(job.failure) == "the scheduler cannot be reached"
    assert job.take()[0] == [10]


async def test_loss_before_an_answer() -> None:
    job, _ = new_job()
    job.fail(SchedulerLostError("the scheduler cannot be reached"))
    assert job.ended
    with pytest.raises(SchedulerLostError):
        await job.answer


async def test_jobs_of_one_request_share_their_wake() -> None:
    wake = asyncio.Event()
    jobs = [Job(handle, f"a.{handle}", None, wake) for handle in range(3)]
    for token, job in enumerate(jobs, 10):
        wake.clear()
        job.deliver(entry(0, token))
        assert wake.is_set()
    assert [job.take()[0] for job in jobs] == [[10], [11], [12]]
