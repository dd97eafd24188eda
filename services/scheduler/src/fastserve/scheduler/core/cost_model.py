"""What an iteration costs, learned from the reports of one worker group."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import Final

from fastserve.scheduler.core.types import CostSample

# Brings the features to about 1, so that one prior fits all of them.
_TOKENS: Final = 512.0
_CONTEXT: Final = 8192.0
_FORGET: Final = 0.99  # weight of the past per sample
_PRIOR: Final = 10.0  # variance of the weights before anything was seen
_SURPRISE: Final = 3.0  # a sample counts at most so many times what was expected
_WINDOW: Final = 63  # decode iterations whose median is taken


class CostModel:
    """seconds = base + per_token * new_tokens + per_context * context_tokens.

    Recursive least squares with forgetting. In a direction nobody looks at (pages of decodes, no
    prefill) the uncertainty grows no further than where it began, so one odd sample cannot wreck
    what was learned.
    """

    def __init__(self, prefill: CostSample, decode: CostSample) -> None:
        more = prefill.new_tokens - decode.new_tokens
        per_token = (prefill.seconds - decode.seconds) / more if more > 0 else 0.0
        per_token = max(per_token, 0.0)
        base = max(decode.seconds - per_token * decode.new_tokens, 0.0)
        self._weights = [base, per_token * _TOKENS, 0.0]
        self._cov = [[_PRIOR if i == j else 0.0 for j in range(3)] for i in range(3)]
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._decode(decode.seconds)

    @property
    def decode_s(self) -> float:
        """Median seconds of the last iterations in which every row decoded."""
        return self._sorted[len(self._sorted) // 2]

    def iteration(self, new_tokens: int, context_tokens: int) -> float:
        """Seconds expected of an iteration."""
        base, tokens, context = (max(weight, 0.0) for weight in self._weights)
        return base + tokens * new_tokens / _TOKENS + context * context_tokens / _CONTEXT

    def prefill(self, tokens: int, budget: int) -> float:
        """Seconds that a prompt of `tokens` takes alone, `budget` tokens per iteration."""
        seconds = 0.0
        done = 0
        while done < tokens:
            chunk = min(budget, tokens - done)
            done += chunk
            seconds += self.iteration(chunk, done)
        return seconds

    def observe(self, sample: CostSample) -> None:
        """Learn from a measured iteration."""
        if sample.seconds <= 0 or not sample.rows:
            return
        if sample.new_tokens == sample.rows:
            self._decode(sample.seconds)
        x = (1.0, sample.new_tokens / _TOKENS, sample.context_tokens / _CONTEXT)
        expected = sum(weight * value for weight, value in zip(self._weights, x, strict=True))
        error = min(sample.seconds - expected, _SURPRISE * abs(expected))
        cov = self._cov
        px = [sum(row[j] * x[j] for j in range(3)) for row in cov]
        spread = sum(px[i] * x[i] for i in range(3))
        gain = [value / (_FORGET + spread) for value in px]
        self._weights = [
            weight + step * error for weight, step in zip(self._weights, gain, strict=True)
        ]
        trace = cov[0][0] + cov[1][1] + cov[2][2]
        forget = _FORGET if trace < 3 * _PRIOR else 1.0
        self._cov = [[(cov[i][j] - gain[i] * px[j]) / forget for j in range(3)] for i in range(3)]

    def _decode(self, seconds: float) -> None:
        self._recent.append(seconds)
        insort(self._sorted, seconds)
        if len(self._recent) > _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
