"""One job of a request, as the gateway follows it, and the packed batches its tokens come in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastserve.proto.v1 import sampling_pb2, scheduler_pb2

UNFINISHED = sampling_pb2.FINISH_REASON_UNSPECIFIED


class TokenLogprob(NamedTuple):
    """Log-probability of a sampled token, and the likeliest ones, likeliest first."""

    logprob: float
    top_ids: Sequence[int]
    top_logprobs: Sequence[float]


class Entry(NamedTuple):
    """What one batch brought for one job; `logprobs` is parallel to `tokens` or None."""

    handle: int
    first_index: int
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    finish: int
    error: str
    cached: int = 0  # prompt tokens from the prefix cache; comes with the first token


def unpack(batch: scheduler_pb2.TokenBatch) -> Iterator[Entry]:
    """The entries of a packed batch."""
    cached = dict(zip(batch.cached_entries, batch.cached_tokens, strict=True))
    errors = dict(zip(batch.error_entries, batch.errors, strict=True))
    at = scored = top = 0
    for entry, handle in enumerate(batch.handles):
        count = batch.token_counts[entry]
        logprobs = None
        if batch.has_logprobs[entry]:
            logprobs = []
            for index in range(scored, scored + count):
                end = top + batch.top_counts[index]
                logprobs.append(
                    TokenLogprob(
                        batch.logprobs[index], batch.top_ids[top:end], batch.top_logprobs[top:end]
                    )
                )
                top = end
            scored += count
        yield Entry(
            handle,
            batch.first_indexes[entry],
            list(batch.tokens[at : at + count]),
            logprobs,
            batch.finish_reasons[entry],
            errors.get(entry, ""),
            cached.get(entry, 0),
        )
        at += count


class JobRefusedError(Exception):
    """The scheduler did not take the job."""

    def __init__(self, rejected: scheduler_pb2.Rejected) -> None:
        super().__init__(rejected.message)
        self.reason = rejected.reason
        self.message = rejected.message
        self.retry_after_s = rejected.retry_after_s


class SchedulerLostError(Exception):
    """The scheduler is gone, or the job was lost with it; the message is meant for the client."""


class GatewayStoppingError(SchedulerLostError):
    """This gateway is about to end; the job goes on."""


class Job:
    """A job that a request follows. The client fills it; the request takes from it.

    What waits here is at most the output limit of the job in token ids (and log-probabilities if
    asked for), however slowly the request takes it: text is made when it is taken.
    """

    def __init__(
        self, handle: int, job_id: str, submit: scheduler_pb2.Submit | None, wake: asyncio.Event
    ) -> None:
        self.handle = handle
        self.job_id = job_id
        self.submit = submit  # until a token has come; None: attached to, not submitted
        self.known = submit is None  # the scheduler has it (as far as anybody can tell)
        self.sent = False  # some stream carried it to the scheduler, which may have it
        self.next_index = 0
        self.dropped = False  # cancelled or detached: nobody follows it
        self.resumable = False  # the client can go on with it at another gateway
        self.detached = False  # left running for another stream to attach to
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.finish: int = UNFINISHED
        self.failure: SchedulerLostError | None = None
        self.cached_tokens = 0  # of the prompt, from the prefix cache
        self._error = ""
        self._wake = wake
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob | None] = []

    @property
    def error(self) -> str:
        """Why it FAILED or missed its DEADLINE, for the client."""
        return self._error

    @property
    def ended(self) -> bool:
        """Nothing comes after what `take` returns now."""
        return self.finish != UNFINISHED or self.failure is not None

    def take(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """Tokens that came since the last call, and their log-probabilities (None: not known)."""
        tokens, self._tokens = self._tokens, []
        logprobs, self._logprobs = self._logprobs, []
        return tokens, logprobs

    def deliver(self, entry: Entry) -> None:
        """Take over a batch entry: tokens seen before are skipped. Raises ValueError on a gap."""
        seen = self.next_index - entry.first_index
        if seen < 0 and not self.dropped:
            raise ValueError(
                f"tokens {self.next_index} to {entry.first_index - 1} of {self.job_id} are missing"
            )
        self.finish = entry.finish
        self._error = entry.error
        if self.dropped:
            return
        self.cached_tokens = entry.cached or self.cached_tokens
        fresh = entry.tokens[seen:]
        if fresh:
            self.next_index += len(fresh)
            self.submit = None
            self._tokens += fresh
            self._logprobs += (
                [None] * len(fresh) if entry.logprobs is None else entry.logprobs[seen:]
            )
        self._wake.set()

    def accept(self) -> None:
        self.known = True
        if not self.answer.done():
            self.answer.set_result(None)

    def fail(self, error: JobRefusedError | SchedulerLostError) -> None:
        """It will never go on."""
        if isinstance(error, SchedulerLostError):
            self.failure = error
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # nobody may wait for it any more
        self._wake.set()
