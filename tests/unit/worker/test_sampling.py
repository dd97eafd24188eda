"""Every sampling parameter, against formulas written out the plain way."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.worker.model.sampling import (
    Sampled,
    SampleRow,
    SamplingParams,
    _first,
    sample,
    uniform,
)

VOCAB = 40
EOS = 3
NOTHING: frozenset[int] = frozenset()


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def row(
    output: list[int] | None = None, prompt: list[int] | None = None, **params: Any
) -> SampleRow:
    values = {"max_tokens": 100, "temperature": 0.0, **params}
    return SampleRow(SamplingParams(**values), prompt or [5], output or [])


def one(logits: torch.Tensor, what: SampleRow, eos: frozenset[int] = NOTHING) -> Sampled:
    """The choice for a single row of logits [vocab]."""
    (chosen,) = sample(logits.reshape(1, VOCAB), [what], eos)
    assert chosen is not None
    return chosen


def drawn(logits: torch.Tensor, draws: int = 600, **params: Any) -> Counter[int]:
    """How often each token comes over many positions."""
    params = {"temperature": 1.0, **params}
    return Counter(one(logits, row([7] * i, **params)).token for i in range(draws))


# --- greedy, temperature, seed -------------------------------------------------------------------


def test_temperature_zero_is_greedy() -> None:
    logits = logits_of(1, rows=4)
    chosen = sample(logits, [row(seed=seed) for seed in range(4)], NOTHING)
    assert chosen == [Sampled(int(best)) for best in logits.argmax(dim=-1)]


def test_draws_follow_the_distribution() -> None:
    for temperature in (0.7, 1.0, 1.6):
        logits = logits_of(2)[0]
        expected = (logits / temperature).softmax(dim=-1)
        counts = drawn(logits, 3000, temperature=temperature)
        for token in range(VOCAB):
            share = float(expected[token])
            slack = 5 * math.sqrt(share * (1 - share) / 3000) + 1e-3
            assert counts[token] / 3000 == pytest.approx(share, abs=slack)


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    logits = logits_of(3)[0]
    for temperature in (1e-3, 1e-20, 1e-44):
        assert one(logits, row(temperature=temperature)).token == int(logits.argmax())


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20))
def test_uniform_is_below_one(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1


def test_uniform_depends_on_seed_and_position() -> None:
    numbers = {uniform(seed, position) for seed in range(50) for position in range(50)}
    assert len(numbers) == 2500
    assert sum(numbers) / 2500 == pytest.approx(0.5, abs=0.03)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 30),
    mates=st.lists(st.integers(0, 2**32), max_size=5),
    place=st.integers(0, 5),
)
def test_a_token_depends_on_seed_and_position_but_not_on_batch_mates(
    seed: int, position: int, mates: list[int], place: int
) -> None:
    params: dict[str, Any] = {
        "temperature": 0.9,
        "top_p": 0.95,
        "top_k": 30,
        "presence_penalty": 0.3,
    }
    mine = row([4] * position, seed=seed, **params)
    logits = logits_of(9)
    alone = one(logits[0], mine)
    place = min(place, len(mates))
    rows = [row([6] * i, seed=mate, **params) for i, mate in enumerate(mates)]
    rows.insert(place, mine)
    batch = logits_of(10, rows=len(rows))
    batch[place] = logits[0]
    assert sample(batch, rows, NOTHING)[place] == alone


def test_seeds_and_positions_give_different_draws() -> None:
    flat = torch.zeros(VOCAB)
    seeds = {one(flat, row(temperature=1.0, seed=seed)).token for seed in range(200)}
    positions = drawn(flat, 200)
    assert len(seeds) > 35 and len(positions) > 35


# --- truncation ----------------------------------------------------------------------------------


def ranked(logits: torch.Tensor) -> tuple[list[int], list[float]]:
    values, ids = logits.double().softmax(dim=-1).sort(descending=True)
    return ids.tolist(), values.tolist()


@pytest.mark.parametrize("top_k", [1, 2, 5, VOCAB, 10 * VOCAB])
def test_top_k_keeps_the_k_likeliest(top_k: int) -> None:
    logits = logits_of(4)[0] / 3
    ids, _ = ranked(logits)
    support = set(drawn(logits, top_k=top_k))
    assert support <= set(ids[:top_k])
    if top_k <= 5:
        assert support == set(ids[:top_k])


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.6, 0.9])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float) -> None:
    logits = logits_of(5)[0]
    ids, values = ranked(logits)
    size, total = 0, 0.0
    while total < top_p:
        total += values[size]
        size += 1
    assert set(drawn(logits, 3000, top_p=top_p)) == set(ids[:size])


@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0, 30.0])  # all equal, flat, as usual, peaked
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (40, 0.5), (3000, 1.0), (0, 0.5), (0, 0.9), (0, 0.9999)]
)
def test_as_much_as_is_needed_is_sorted_as_the_whole_would_be(
    scale: float, top_k: int, top_p: float
) -> None:
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(1)).bfloat16()  # some equal
    probabilities = (logits.double() * scale).softmax(dim=-1)
    values, ids = _first(probabilities, SamplingParams(1, top_k=top_k, top_p=top_p))
    every, order = probabilities.sort(descending=True, stable=True)
    assert torch.equal(values, every[: len(values)]) and torch.equal(ids, order[: len(values)])
    if len(values) < len(probabilities):
        assert len(values) >= top_k and (top_k or float(values.sum()) >= top_p)


@pytest.mark.parametrize("min_p", [0.05, 0.2, 1.0])
def test_min_p_keeps_what_is_likely_beside_the_likeliest(min_p: float) -> None:
    logits = logits_of(6)[0]
    ids, values = ranked(logits)
    kept = {i for i, value in zip(ids, values, strict=True) if value >= min_p * values[0]}
    assert set(drawn(logits, 3000, min_p=min_p)) == kept


def test_top_p_counts_what_top_k_left() -> None:
    # 0.4, 0.3, 0.2, 0.1: of the two that top_k leaves the first alone holds 4/7 > 0.55.
    logits = torch.full((VOCAB,), -1e9)
    logits[:4] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(drawn(logits, top_k=2, top_p=0.55)) == {0}
    assert set(drawn(logits, top_p=0.55)) == {0, 1}
    assert set(drawn(logits, top_p=0.95, min_p=0.7)) == {0, 1}


# --- changed logits ------------------------------------------------------------------------------


def naive_penalties(logits: list[float], what: SampleRow) -> list[float]:
    """Penalties and bias, one token at a time."""
    params, changed = what.params, []
    for token, logit in enumerate(logits):
        value = logit
        if token in what.prompt_ids or token in what.output_ids:
            penalty = params.repetition_penalty
            value = logit / penalty if logit > 0 else logit * penalty
        count = list(what.output_ids).count(token)
        value -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        value += dict(params.logit_bias).get(token, 0.0)
        changed.append(value)
    return changed


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@settings(deadline=None)
@given(
    prompt=tokens.filter(bool),
    output=tokens,
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    repetition=st.floats(0.5, 2),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
)
def test_penalties_and_bias_as_in_the_plain_formula(
    prompt: list[int],
    output: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
) -> None:
    logits = logits_of(7)[0]
    before = logits.clone()
    what = row(
        output,
        prompt,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=tuple(bias.items()),
    )
    expected = naive_penalties(logits.tolist(), what)
    assert expected[one(logits, what).token] == pytest.approx(max(expected), abs=1e-4)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("output", "params"),
    [
        ([0], {"presence_penalty": 1.0}),
        ([0] * 4, {"frequency_penalty": 0.25}),
        ([0], {"repetition_penalty": 2.0}),
        ([], {"logit_bias": ((0, -1.0),)}),
        ([], {"logit_bias": ((1, 1.0),)}),
        ([], {"repetition_penalty": 2.0, "prompt": [0]}),
    ],
)
def test_each_change_turns_a_choice(output: list[int], params: dict[str, Any]) -> None:
    logits = torch.zeros(VOCAB)
    logits[0], logits[1] = 1.0, 0.7
    assert one(logits, row([9] * len(output))).token == 0
    assert one(logits, row(output, **params)).token == 1


def test_presence_counts_once_and_only_output_counts() -> None:
    logits = torch.zeros(VOCAB)
    logits[0], logits[1] = 1.0, 0.0
    assert one(logits, row([0] * 50, presence_penalty=0.9)).token == 0
    assert one(logits, row(prompt=[0] * 50, presence_penalty=2.0)).token == 0
    assert one(logits, row(prompt=[0] * 50, frequency_penalty=2.0)).token == 0


def test_min_tokens_bans_every_end_until_reached() -> None:
    logits = torch.zeros(VOCAB)
    logits[EOS], logits[8], logits[9] = 3.0, 2.0, 1.0
    ends: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": frozenset({8})}
    eos = frozenset({EOS})
    assert one(logits, row([9], **ends), eos).token == 9
    assert one(logits, row([9, 9], **ends), eos).token == EOS
    assert one(logits, row([9], ignore_eos=True, **ends), eos).token == EOS


# --- log-probabilities and failures --------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_are_those_of_the_model(count: int, temperature: float) -> None:
    logits = logits_of(8)[0]
    expected = logits.log_softmax(dim=-1)
    what = row([2], temperature=temperature, logprobs=count, presence_penalty=1.0, top_k=3)
    chosen = one(logits, what)
    assert chosen.logprob == pytest.approx(float(expected[chosen.token]), abs=1e-6)
    assert len(chosen.top) == count
    best = expected.argsort(descending=True)[:count].tolist()
    assert [token for token, _ in chosen.top] == best
    for token, value in chosen.top:
        assert value == pytest.approx(float(expected[token]), abs=1e-6)


def test_logprobs_do_not_change_the_token() -> None:
    logits = logits_of(11)[0]
    for seed in range(20):
        plain = one(logits, row(temperature=1.0, seed=seed))
        assert (plain.logprob, plain.top) == (None, ())
        assert one(logits, row(temperature=1.0, seed=seed, logprobs=2)).token == plain.token


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_not_finite_gives_none_for_its_row_alone(
    bad: float, temperature: float
) -> None:
    logits = logits_of(12, rows=3)
    logits[1, 17] = bad
    chosen = sample(logits, [row(temperature=temperature)] * 3, NOTHING)
    assert [found is None for found in chosen] == [False, True, False]


def test_a_row_of_minus_infinity_gives_none() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    assert sample(logits, [row()], NOTHING) == [None]


def test_minus_infinity_bans_a_token_and_nothing_else() -> None:
    logits = logits_of(13)[0]
    best = int(logits.argmax())
    logits[best] = -math.inf
    assert best not in drawn(logits, 200)
