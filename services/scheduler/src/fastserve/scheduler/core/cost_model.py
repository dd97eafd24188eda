"""What an iteration costs, learned from the reports of one worker group."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

from fastserve.scheduler.core.types import CostSample

# Bring the features to about 1, so that one prior fits all of them.
_TOKENS: Final = 512.0
_ATTENTION: Final = 131072.0  # a prompt of 512 tokens
_ROWS: Final = 16.0
_CONTEXT: Final = 8192.0
_FORGET: Final = 0.99  # weight of the past per sample
_PRIOR: Final = 10.0  # variance of the weights before anything was seen
_SURPRISE: Final = 3.0  # a sample counts at most so many times what was expected
_KNOWN: Final = 0.002  # a smaller relative error teaches nothing
_WINDOW: Final = 63  # decode iterations whose median is taken
_NEWEST: Final = 0.05  # share of the newest iteration in the mean error
_PROVEN: Final = 64  # iterations after which the model says something about other batches
_N: Final = 5


class Work(NamedTuple):
    """What an iteration has to do.

    prefill_tokens: of all chunks. attention: over these tokens, the sum of the tokens that each
    attends to. rows, context: decodes, and the tokens that they attend to together.
    """

    prefill_tokens: int
    attention: int
    rows: int
    context: int


def work_of(rows: Iterable[tuple[str, int, int]]) -> Work:
    """A row of one token counts as a decode, which it is but for prompts of one token."""
    tokens = attention = decodes = context = 0
    for _, new, computed in rows:
        if new == 1:
            decodes += 1
            context += computed
        else:
            tokens += new
            attention += new * computed - new * (new - 1) // 2
    return Work(tokens, attention, decodes, context)


def chunk(start: int, tokens: int) -> Work:
    """A prefill chunk of `tokens` after `start` tokens that are computed already."""
    return Work(tokens, tokens * (start + tokens) - tokens * (tokens - 1) // 2, 0, 0)


class CostModel:
    """seconds = base + the sum over `Work` of a weight times what there is of it.

    Recursive least squares with forgetting. In a direction nobody looks at (pages of decodes, no
    prefill) the uncertainty grows no further than where it began, so one odd sample cannot wreck
    what was learned; nor can it count for more than a few times what was expected.
    """

    def __init__(self, prefill: CostSample, decode: CostSample) -> None:
        """Two measurements at the start: one prefill chunk of one prompt, one decode iteration."""
        more = prefill.new_tokens - decode.new_tokens
        per_token = (prefill.seconds - decode.seconds) / more if more > 0 else 0.0
        per_token = max(per_token, 0.0)
        base = max(decode.seconds - per_token * decode.rows, 0.0)
        # Until it is seen what a decode costs, it costs what a prompt token does.
        self._weights = [base, per_token * _TOKENS, 0.0, per_token * _ROWS, 0.0]
        self._cov = _prior()
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self.decode_s = 0.0  # median of the last iterations in which every row decoded
        self._decode(decode.seconds)
        self.error = 0.0  # running mean of |predicted - measured| / measured
        self.samples = 0  # iterations that it was compared with
        self._context = float(decode.context_tokens) / decode.rows  # running mean of a decode's
        self._rows = float(decode.rows)  # likewise, rows of an iteration without prefill

    def seconds(self, work: Work) -> float:
        """Expected of an iteration. Never negative; no part of the work makes it shorter."""
        base, tokens, attention, rows, context = self._weights
        return (
            max(base, 0.0)
            + max(tokens, 0.0) * work.prefill_tokens / _TOKENS
            + max(attention, 0.0) * work.attention / _ATTENTION
            + max(rows, 0.0) * work.rows / _ROWS
            + max(context, 0.0) * work.context / _CONTEXT
        )

    @property
    def prefill_tokens_per_s(self) -> float:
        """Of one prompt of 512 tokens, alone in an iteration; 0 if that takes no time at all."""
        tokens = int(_TOKENS)
        seconds = self.seconds(chunk(0, tokens))
        return tokens / seconds if seconds > 0 else 0.0

    @property
    def usual_rows(self) -> float:
        """Decodes in an iteration without prefill, running mean."""
        return self._rows

    def rows_worth(self, share: float) -> float:
        """Decodes in an iteration beyond which one more row adds less throughput than `share` of
        what it would add if rows cost nothing. Infinite if they do.

        With r rows of c seconds each beside `base`, throughput r / (base + c r) grows by the share
        base / (base + c r) of proportionally.
        """
        base, _, _, rows, context = self._weights
        per_row = max(rows, 0.0) / _ROWS + max(context, 0.0) * self._context / _CONTEXT
        return max(base, 0.0) * (1.0 / share - 1.0) / per_row if per_row > 0 else math.inf

    def decode(self, rows: int) -> float:
        """Seconds of an iteration with so many decodes of the usual context: what those of late
        took, times what the model says that the difference in rows makes, once it is proven."""
        if self.samples < _PROVEN:
            return self.decode_s
        usual = self._of_rows(self._rows)
        return self.decode_s * self._of_rows(rows) / usual if usual > 0 else self.decode_s

    def _of_rows(self, rows: float) -> float:
        base, _, _, per_row, context = self._weights
        each = max(per_row, 0.0) / _ROWS + max(context, 0.0) * self._context / _CONTEXT
        return max(base, 0.0) + rows * each

    def prefill(self, tokens: int, budget: int) -> float:
        """Seconds that a prompt of `tokens` takes alone, `budget` tokens per iteration."""
        return sum(
            self.seconds(chunk(start, min(budget, tokens - start)))
            for start in range(0, tokens, budget)
        )

    def more(self, start: int, tokens: int) -> float:
        """Seconds by which so many prompt tokens after `start` make an iteration longer."""
        return self.seconds(chunk(start, tokens)) - max(self._weights[0], 0.0)

    def observe(self, work: Work, seconds: float) -> None:
        """Learn from a measured iteration."""
        if seconds <= 0 or not (work.rows or work.prefill_tokens):
            return
        if work.rows:
            self._context += _NEWEST * (work.context / work.rows - self._context)
        if not work.prefill_tokens:
            self._decode(seconds)
            self._rows += _NEWEST * (work.rows - self._rows)
        relative = abs(self.seconds(work) - seconds) / seconds
        self.error += _NEWEST * (min(relative, 10.0) - self.error)
        self.samples += 1
        if relative < _KNOWN:
            return
        x = (
            1.0,
            work.prefill_tokens / _TOKENS,
            work.attention / _ATTENTION,
            work.rows / _ROWS,
            work.context / _CONTEXT,
        )
        expected = sum(map(_times, self._weights, x))
        error = min(seconds - expected, _SURPRISE * abs(expected))
        cov = self._cov
        px = [sum(map(_times, row, x)) for row in cov]
        spread = sum(map(_times, px, x))
        if not 0 <= spread < _PRIOR * 1e6:  # rounding has eaten the matrix: begin anew
            self._cov = _prior()
            return
        scale = _FORGET + spread
        self._weights = [w + p / scale * error for w, p in zip(self._weights, px, strict=True)]
        trace = sum(cov[i][i] for i in range(_N))
        forget = _FORGET if trace < _N * _PRIOR else 1.0
        self._cov = [
            [(value - p * q / scale) / forget for value, q in zip(row, px, strict=True)]
            for row, p in zip(cov, px, strict=True)
        ]

    def _decode(self, seconds: float) -> None:
        self._recent.append(seconds)
        insort(self._sorted, seconds)
        if len(self._recent) > _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self.decode_s = self._sorted[len(self._sorted) // 2]


def _prior() -> list[list[float]]:
    return [[_PRIOR if i == j else 0.0 for j in range(_N)] for i in range(_N)]


def _times(a: float, b: float) -> float:
    return a * b
