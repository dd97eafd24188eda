"""The jobs of one request and the text that comes out of them.

A request has one job per choice: `n` for each prompt. They are submitted together and cancelled
together. Text, stop strings and counts depend on the tokens alone, not on how they arrive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from fastserve.gateway.errors import (
    ApiError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from fastserve.gateway.jobs import (
    GatewayStoppingError,
    Job,
    JobRefusedError,
    SchedulerLostError,
    TokenLogprob,
)
from fastserve.gateway.metrics import RequestTimes
from fastserve.gateway.scheduler_client import SchedulerClient
from fastserve.gateway.stop_strings import StopStrings
from fastserve.gateway.tokenizer import Tokenizer
from fastserve.proto.v1 import sampling_pb2, scheduler_pb2

STOP: Final = "stop"
LENGTH: Final = "length"
_REASONS: Final[dict[int, str]] = {
    sampling_pb2.FINISH_REASON_STOP: STOP,
    sampling_pb2.FINISH_REASON_LENGTH: LENGTH,
}

Token = tuple[int, TokenLogprob | None]


class ScoredToken(NamedTuple):
    """A token of the answer with its log-probabilities (None: lost with a former scheduler)."""

    token_id: int
    scores: TokenLogprob | None
    offset: int  # characters of the choice before it


class Delta(NamedTuple):
    """What is new of one choice; `finish_reason` comes once, with the last one."""

    choice: int
    text: str
    scored: list[ScoredToken]
    finish_reason: str | None


@dataclass(frozen=True)
class TextOptions:
    """How tokens become text, the same for all choices of a request."""

    stop: Sequence[str] = ()
    min_tokens: int = 0  # stop strings count from here on
    logprobs: bool = False
    continuation: bool = False  # the answer goes on with the text of the prompt


class Choice:
    """One answer: takes tokens, gives text."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, options: TextOptions, seen: int = 0
    ) -> None:
        """`seen`: tokens whose text the client has from an earlier connection."""
        self.index = index
        self._seen = seen
        self.tokens = 0  # that the answer is made of, stop token and stop string included
        self.finish_reason: str | None = None
        self._options = options
        self._plain = not options.stop and not options.logprobs  # text is all there is to it
        self._pieces = tokenizer.pieces
        self._detokenizer = tokenizer.detokenizer(continuation=options.continuation)
        self._stops = StopStrings(options.stop)
        self._decoded = 0  # characters that the tokens gave
        self._shown = 0
        self._scored: list[ScoredToken] = []

    def feed(self, tokens: Sequence[Token], finish: int) -> Delta:
        """Take the next tokens. `finish` is the job's finish reason, once it has ended well.

        If a stop string is found, what follows it is ignored and `finish_reason` is set.
        """
        if self._plain and not finish and self.tokens >= self._seen:
            text = self._take(tokens)
            self._shown += len(text)
            return Delta(self.index, text, [], None)
        stop_token: Sequence[Token] = ()
        if finish == sampling_pb2.FINISH_REASON_STOP:  # the last token ended it and is no text
            tokens, stop_token = tokens[:-1], tokens[-1:]
        replayed = max(0, self._seen - self.tokens)
        if replayed:
            self._shown += len(self._take(tokens[:replayed]))
            self._shown_scores()
        text = self._take(tokens[replayed:])
        if self._stops.found:
            self.finish_reason = STOP
        elif finish:
            self.tokens += len(stop_token)
            text += self._passed(self._detokenizer.flush())
            if self._stops.found:  # a stop string may hold U+FFFD
                self.finish_reason = STOP
            else:
                text += self._stops.flush()
                self.finish_reason = _REASONS[finish]
        self._shown += len(text)
        return Delta(self.index, text, self._shown_scores(), self.finish_reason)

    def _take(self, tokens: Sequence[Token]) -> str:
        """The text that these tokens let out, up to a stop string."""
        if self._plain:
            self.tokens += len(tokens)
            return self._detokenizer.feed_all([token_id for token_id, _ in tokens])
        text = ""
        for token in tokens:
            if self._stops.found:
                break
            text += self._text_of(token)
        return text

    def _text_of(self, token: Token) -> str:
        token_id, scores = token
        self.tokens += 1
        if self._options.logprobs and not self._pieces.is_special(token_id):
            self._scored.append(ScoredToken(token_id, scores, self._decoded))
        return self._passed(self._detokenizer.feed(token_id))

    def _passed(self, text: str) -> str:
        self._decoded += len(text)
        if self.tokens <= self._options.min_tokens:
            return text
        return self._stops.feed(text)

    def _shown_scores(self) -> list[ScoredToken]:
        """The tokens that the text shown begins; the others come with theirs, or never."""
        ready = [scored for scored in self._scored if scored.offset < self._shown]
        self._scored = self._scored[len(ready) :]
        return ready


class Generation:
    """The accepted jobs of a request. Close it, however it ends."""

    def __init__(
        self,
        client: SchedulerClient,
        jobs: Sequence[Job],
        choices: Sequence[Choice],
        wake: asyncio.Event,
        times: RequestTimes,
        n: int,
    ) -> None:
        self.choices = choices
        self._n = n
        self._client = client
        self._jobs = jobs
        self._wake = wake
        self._times = times
        self._open = dict(zip(choices, jobs, strict=True))

    @classmethod
    async def start(
        cls,
        client: SchedulerClient,
        submits: Sequence[scheduler_pb2.Submit],
        choices: Sequence[Choice],
        times: RequestTimes,
        *,
        n: int = 1,
        attach: bool = False,
    ) -> Generation:
        """Submit all jobs; returns once all are accepted. Raises `ApiError` if one is not.

        n: choices of each prompt, one after the other.
        attach: they were submitted before, by a gateway that is gone: take them over.
        """
        wake = asyncio.Event()
        if attach:
            calls = [client.attach(submit.job_id, wake) for submit in submits]
        else:
            calls = [client.submit(submit, wake) for submit in submits]
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            jobs = await asyncio.gather(*tasks)
        except BaseException as error:
            for task in tasks:
                task.cancel()
            for job in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(job, Job):
                    client.cancel(job)
            if isinstance(error, JobRefusedError | SchedulerLostError):
                raise api_error(error, attach=attach) from error
            raise
        return cls(client, jobs, choices, wake, times, n)

    @property
    def complete(self) -> bool:
        return not self._open

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that no choice of the prompt had to compute, as far as tokens came."""
        cached = [job.cached_tokens for job in self._jobs]
        return sum(min(cached[at : at + self._n]) for at in range(0, len(cached), self._n))

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the request to its first token."""
        return self._times.first_token_s

    def nudge(self) -> None:
        """Let `next` return, with or without news."""
        self._wake.set()

    async def next(self) -> list[Delta]:
        """Wait for news of the open choices. Raises `ApiError` if a job failed."""
        await self._wake.wait()
        self._wake.clear()
        deltas = []
        for choice, job in list(self._open.items()):
            tokens, logprobs = job.take()
            if job.ended:
                _check_end(job)
            elif not tokens:
                continue
            if tokens:
                self._times.tokens(choice.index, len(tokens))
            delta = choice.feed(list(zip(tokens, logprobs, strict=True)), job.finish)
            if delta.finish_reason is not None:
                del self._open[choice]
                self._client.cancel(job)  # a stop string ends it before its tokens do
                self._times.finish(choice.index, delta.finish_reason, choice.tokens)
            deltas.append(delta)
        if self.complete:
            self._times.complete()
        return deltas

    def may_resume(self) -> None:
        """The client can go on with the answer at another gateway, should this one end."""
        for job in self._jobs:
            job.resumable = True

    def close(self) -> None:
        """Cancel what has not ended."""
        for job in self._jobs:
            self._client.cancel(job)


def _check_end(job: Job) -> None:
    """Raises `ApiError` if a job that ended has no complete answer."""
    if job.failure is not None:
        raise api_error(job.failure)
    if job.finish == sampling_pb2.FINISH_REASON_DEADLINE:
        raise DeadlineError(job.error)
    if job.finish == sampling_pb2.FINISH_REASON_FAILED:
        raise InternalError(job.error or "the job failed")
    if job.finish not in _REASONS:
        raise InternalError("the answer was cancelled by the server")


def api_error(error: JobRefusedError | SchedulerLostError, *, attach: bool = False) -> ApiError:
    """What the client is told."""
    if isinstance(error, GatewayStoppingError):
        return UnavailableError(str(error), "draining")
    if isinstance(error, SchedulerLostError):
        return UnavailableError(str(error), "scheduler_unavailable")
    match error.reason:
        case scheduler_pb2.REJECT_REASON_QUEUE_FULL:
            return OverloadedError(error.message, error.retry_after_s)
        case scheduler_pb2.REJECT_REASON_NO_WORKER:
            return UnavailableError(error.message, "no_workers", error.retry_after_s)
        case scheduler_pb2.REJECT_REASON_DRAINING:
            return UnavailableError(error.message, "draining", error.retry_after_s)
        case scheduler_pb2.REJECT_REASON_DEADLINE:
            return DeadlineError(error.message)
        case scheduler_pb2.REJECT_REASON_TOO_LONG:
            return InvalidRequestError(error.message, code="context_length_exceeded")
        case scheduler_pb2.REJECT_REASON_NOT_FOUND if attach:
            return answer_not_found()
        case scheduler_pb2.REJECT_REASON_INVALID:
            return InvalidRequestError(error.message)
    return InternalError()


def answer_not_found() -> ApiError:
    """404 for a client that wants to go on with an answer."""
    return InvalidRequestError(
        "there is no such answer (any more)", status=404, code="answer_not_found"
    )
