"""From logits to tokens.

The random number for an output position is a hash of (seed, position): a token that has to be
recomputed after a failure comes out the same, whatever batch it is in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

_MASK = (1 << 64) - 1
_FEW = 256


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one job's tokens are chosen; meanings and ranges as in sampling.proto."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int | None = None
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    ignore_eos: bool = False

    @property
    def plain_greedy(self) -> bool:
        """Whether the likeliest token is the answer, with nothing else to do."""
        return self.temperature == 0.0 and not self.changes_logits and self.logprobs is None

    @property
    def top(self) -> int:
        """How many of the likeliest tokens the choice depends on; 0: all of them."""
        if self.plain_greedy:
            return 1
        few = self.temperature > 0 and 0 < self.top_k <= _FEW
        return self.top_k if few and not self.changes_logits and self.logprobs is None else 0

    @property
    def changes_logits(self) -> bool:
        """Whether some logit is changed before the choice."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.min_tokens
        )


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What the choice of one row depends on. `len(output_ids)` is the position to be sampled.

    A plain greedy one depends on no tokens: they may be left out.
    """

    params: SamplingParams
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; log-probabilities only if asked for, `top` likeliest first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone (splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & _MASK
    for _ in range(2):
        z = (z + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
    return (z >> 11) * 2.0**-53


def sample(
    logits: torch.Tensor, rows: Sequence[SampleRow], eos_token_ids: frozenset[int]
) -> list[Sampled | None]:
    """Choose a token per row of logits [rows, vocab] (float32).

    None stands for a row whose logits are not finite: the model failed for that job.
    """
    finite, tokens = _likeliest(logits)
    return [
        None
        if not finite[index]
        else Sampled(tokens[index])
        if row.params.plain_greedy
        else _sample_row(logits[index], row, eos_token_ids)
        for index, row in enumerate(rows)
    ]


def _likeliest(logits: torch.Tensor) -> tuple[list[bool], list[int]]:
    """Of each row: whether its logits are finite, and the first of its largest ones."""
    # One NaN makes the maximum NaN; +inf shows as itself; -inf everywhere too.
    if logits.device.type == "cpu":  # NumPy does it ten times as fast as torch.max
        numbers = logits.numpy()
        places = numbers.argmax(axis=-1).tolist()
        return [math.isfinite(row[at]) for row, at in zip(numbers, places, strict=True)], places
    values, indexes = logits.max(dim=-1)
    return values.isfinite().tolist(), indexes.tolist()


@torch.inference_mode()
def _sample_row(logits: torch.Tensor, row: SampleRow, eos: frozenset[int]) -> Sampled:
    params = row.params
    changed = _changed_logits(logits, row, eos) if params.changes_logits else logits
    if params.temperature == 0.0:
        token = int(changed.argmax())
    else:
        # In double: divided by the smallest temperature, float32 would overflow.
        token = _draw(changed.double() / params.temperature, params, len(row.output_ids))
    if params.logprobs is None:
        return Sampled(token)
    # Of the model's own distribution, before penalties and truncation.
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(params.logprobs)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(token, float(logprobs[token]), top)


def _changed_logits(logits: torch.Tensor, row: SampleRow, eos: frozenset[int]) -> torch.Tensor:
    """A copy of logits [vocab] with penalties, bias and min_tokens applied."""
    params = row.params
    logits = logits.clone()
    vocab, device = logits.shape[0], logits.device
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list({*row.prompt_ids, *row.output_ids}), device=device)
        values = logits[seen]
        scaled = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
        logits[seen] = scaled
    if row.output_ids and (params.presence_penalty or params.frequency_penalty):
        output = torch.tensor(row.output_ids, device=device)
        counts = torch.bincount(output, minlength=vocab)
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    for token, bias in params.logit_bias:
        logits[token] += bias
    if len(row.output_ids) < params.min_tokens:
        ends = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | eos
        logits[list(ends)] = float("-inf")
    return logits


def _first(
    probabilities: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """As many of the likeliest as top_k or top_p can choose from, and more perhaps, with their ids;
    equal ones by id. To sort a whole vocabulary takes milliseconds."""
    count = min(params.top_k or _FEW, len(probabilities))
    least = probabilities.topk(count).values[-1]
    ids = (probabilities >= least).nonzero()[:, 0]
    values, order = probabilities[ids].sort(descending=True, stable=True)
    if params.top_k or float(values.cumsum(dim=0)[-1]) >= params.top_p:
        return values, ids[order]
    return probabilities.sort(descending=True, stable=True)


def _draw(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    """Draw from softmax(logits [vocab]) cut down by top_k, top_p and min_p, in that order."""
    probabilities = logits.softmax(dim=-1)
    if params.top_k or params.top_p < 1.0:
        values, ids = _first(probabilities, params)
        if params.top_k:
            values, ids = values[: params.top_k], ids[: params.top_k]
            values = values / values.sum()
        if params.top_p < 1.0:
            # Keep the smallest set that reaches top_p: drop what comes after it is reached.
            before = values.cumsum(dim=0) - values
            keep = before < params.top_p
            values, ids = values[keep], ids[keep]
    else:
        values, ids = probabilities, None
    if params.min_p:
        values = torch.where(values >= params.min_p * values.max(), values, 0.0)
    cumulative = values.cumsum(dim=0)
    point = uniform(params.seed, position) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, point, right=True))
    # Rounding may put the point on the very end; the last token with any weight is meant then.
    index = min(index, int(values.nonzero()[-1]))
    return index if ids is None else int(ids[index])
