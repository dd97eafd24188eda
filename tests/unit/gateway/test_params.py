"""What needs more than one field: limits, vocabulary, class, deadline, seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.gateway.errors import InvalidRequestError
from fastserve.gateway.params import (
    CLASS_HEADER,
    FAIRNESS_HEADER,
    TENANT_HEADER,
    TIMEOUT_HEADER,
    Grant,
    asked_max_tokens,
    certain_tokens,
    check_vocabulary,
    max_tokens_of,
    ordering_of,
    sampling_of,
    seeds_of,
    tier_of,
)
from fastserve.gateway.schemas import ChatCompletionRequest, CompletionRequest, GenerationBody
from fastserve.gateway.tokenizer import Tokenizer
from fastserve.proto.v1.sampling_pb2 import SamplingParams

VOCABULARY = 49_152


def chat(**fields: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "Hi"}]
    return ChatCompletionRequest.model_validate({"model": "m", "messages": messages, **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "Once", **fields})


def test_without_parameters_sampling_is_plain(default_tokenizer: Tokenizer) -> None:
    assert sampling_of(chat(), default_tokenizer) == SamplingParams(
        temperature=1.0, top_p=1.0, repetition_penalty=1.0
    )


def test_every_parameter_reaches_its_field(default_tokenizer: Tokenizer) -> None:
    body = chat(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        presence_penalty=-1.5,
        frequency_penalty=1.5,
        repetition_penalty=1.25,
        logit_bias={"9": -100, "3": 0.5},
        min_tokens=4,
        stop_token_ids=[8, 5],
        ignore_eos=True,
    )
    assert sampling_of(body, default_tokenizer) == SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        presence_penalty=-1.5,
        frequency_penalty=1.5,
        repetition_penalty=1.25,
        logit_bias_ids=[9, 3],
        logit_bias_values=[-100, 0.5],
        min_tokens=4,
        stop_token_ids=[8, 5],
        ignore_eos=True,
    )


def test_zero_is_not_taken_for_the_default(default_tokenizer: Tokenizer) -> None:
    assert sampling_of(chat(temperature=0), default_tokenizer).temperature == 0


@pytest.mark.parametrize("off", [0, -1, None])
def test_top_k_off(off: int | None, default_tokenizer: Tokenizer) -> None:
    assert sampling_of(chat(top_k=off), default_tokenizer).top_k == 0


@pytest.mark.parametrize(
    "key", [str(VOCABULARY), "-1", "+1", " 1", "1.0", "", "x", "١", "1\n", "9" * 5000]
)
def test_logit_bias_of_what_is_no_token(key: str, default_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="not a token id") as caught:
        sampling_of(chat(logit_bias={"1": 1, key: 1}), default_tokenizer)
    assert caught.value.param == "logit_bias"
    assert len(caught.value.message) < 100


@pytest.mark.parametrize("token_id", [-1, VOCABULARY, 2**70])
def test_stop_tokens_are_of_the_vocabulary(token_id: int, default_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match=str(token_id)) as caught:
        sampling_of(chat(stop_token_ids=[1, token_id]), default_tokenizer)
    assert caught.value.param == "stop_token_ids"


def test_the_whole_vocabulary_is_known(default_tokenizer: Tokenizer) -> None:
    check_vocabulary(range(VOCABULARY), default_tokenizer, "prompt")
    with pytest.raises(InvalidRequestError) as caught:
        check_vocabulary([VOCABULARY], default_tokenizer, "prompt")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("body", "prompt_tokens", "expected"),
    [
        (chat(), 10, 90),  # what remains
        (chat(), 99, 1),
        (chat(max_tokens=5), 10, 5),
        (chat(max_tokens=90), 10, 90),
        (chat(max_completion_tokens=7), 10, 7),
        (chat(max_tokens=7, max_completion_tokens=7), 10, 7),
        (chat(max_tokens=5, min_tokens=5), 10, 5),
        (completion(), 10, 16),
        (completion(), 90, 10),
        (completion(max_tokens=50), 10, 50),
    ],
)
def test_output_limit(body: GenerationBody, prompt_tokens: int, expected: int) -> None:
    assert max_tokens_of(body, prompt_tokens, 100, "messages") == expected


@pytest.mark.parametrize(
    ("body", "prompt_tokens", "param", "code"),
    [
        (chat(), 100, "messages", "context_length_exceeded"),
        (chat(max_tokens=1), 101, "messages", "context_length_exceeded"),
        (chat(max_tokens=91), 10, "max_tokens", "context_length_exceeded"),
        (chat(max_tokens=2**80), 10, "max_tokens", "context_length_exceeded"),
        (chat(max_completion_tokens=91), 10, "max_completion_tokens", "context_length_exceeded"),
        (chat(max_tokens=5, max_completion_tokens=6), 10, "max_completion_tokens", None),
        (chat(max_tokens=5, min_tokens=6), 10, "min_tokens", None),
        (chat(min_tokens=91), 10, "min_tokens", None),
        (completion(min_tokens=17), 10, "min_tokens", None),
    ],
)
def test_limits_that_do_not_fit(
    body: GenerationBody, prompt_tokens: int, param: str, code: str | None
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        max_tokens_of(body, prompt_tokens, 100, "messages")
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


@given(
    prompt_tokens=st.integers(1, 120),
    max_tokens=st.none() | st.integers(1, 120),
    min_tokens=st.none() | st.integers(0, 120),
    make=st.sampled_from([chat, completion]),
)
def test_a_limit_is_given_exactly_if_it_fits(
    prompt_tokens: int, max_tokens: int | None, min_tokens: int | None, make: Any
) -> None:
    left = 100 - prompt_tokens
    asked = max_tokens or (left if make is chat else min(16, left))
    fits = 1 <= asked <= left and (min_tokens or 0) <= asked
    body = make(max_tokens=max_tokens, min_tokens=min_tokens)
    if fits:
        assert max_tokens_of(body, prompt_tokens, 100, "prompt") == asked
    else:
        with pytest.raises(InvalidRequestError):
            max_tokens_of(body, prompt_tokens, 100, "prompt")


def test_which_field_gives_the_limit() -> None:
    assert asked_max_tokens(chat(max_tokens=3)) == (3, "max_tokens")
    assert asked_max_tokens(chat(max_completion_tokens=3)) == (3, "max_completion_tokens")
    assert asked_max_tokens(completion()) == (None, "max_tokens")


def test_ordering_without_headers() -> None:
    ordering = ordering_of(chat(), {}, Grant())
    assert (ordering.tenant, ordering.service_class) == ("default", "default")
    assert (ordering.priority, ordering.timeout_s) == (0, None)
    assert not ordering.unknown_class and not ordering.capped_class
    assert ordering.tenant_weight == 1.0


@pytest.mark.parametrize(
    ("tier", "header", "service_class", "unknown", "reported"),
    [
        (None, None, "default", False, None),
        (None, "batch", "batch", False, None),
        ("auto", None, "default", False, "default"),
        ("default", None, "default", False, "default"),
        ("priority", None, "interactive", False, "priority"),
        ("flex", None, "batch", False, "flex"),
        ("flex", "interactive", "interactive", False, "priority"),  # the header wins
        ("flex", "golden", "default", True, "default"),
        (None, "", "default", True, None),
    ],
)
def test_class(
    tier: str | None, header: str | None, service_class: str, unknown: bool, reported: str | None
) -> None:
    body = chat(service_tier=tier)
    ordering = ordering_of(body, {} if header is None else {CLASS_HEADER: header}, Grant())
    assert (ordering.service_class, ordering.unknown_class) == (service_class, unknown)
    assert tier_of(body, ordering) == reported


def test_priority_is_handed_on_as_it_is() -> None:
    assert ordering_of(chat(priority=-5), {}, Grant()).priority == -5


@pytest.mark.parametrize("tenant", ["a", "team/one:x", "~" * 128])
def test_tenant(tenant: str) -> None:
    assert ordering_of(chat(), {TENANT_HEADER: tenant}, Grant()).tenant == tenant


@pytest.mark.parametrize("tenant", ["", "a b", "a\n", "ü", "~" * 129])
def test_bad_tenant(tenant: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ordering_of(chat(), {TENANT_HEADER: tenant}, Grant())
    assert caught.value.param == TENANT_HEADER


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [
        ({FAIRNESS_HEADER: "blue"}, "blue"),
        ({FAIRNESS_HEADER: "blue", TENANT_HEADER: "green"}, "green"),  # our own wins
    ],
)
def test_tenant_as_llm_d_calls_it(headers: dict[str, str], tenant: str) -> None:
    assert ordering_of(chat(), headers, Grant()).tenant == tenant


@pytest.mark.parametrize("header", [TENANT_HEADER, FAIRNESS_HEADER])
def test_the_tenant_of_a_key_cannot_be_changed(header: str) -> None:
    grant = Grant("acme", weight=2.5)
    for headers in ({}, {header: "acme"}):
        ordering = ordering_of(chat(), headers, grant)
        assert (ordering.tenant, ordering.tenant_weight) == ("acme", 2.5)
    with pytest.raises(InvalidRequestError) as caught:
        ordering_of(chat(), {header: "other"}, grant)
    error = caught.value
    assert (error.status, error.param, error.code) == (403, header, "tenant_not_allowed")
    assert "acme" not in error.message


@pytest.mark.parametrize(
    ("highest", "tier", "header", "service_class", "capped"),
    [
        ("default", None, "interactive", "default", True),
        ("default", "priority", None, "default", True),
        ("default", None, "batch", "batch", False),
        ("default", None, None, "default", False),
        ("batch", None, "default", "batch", True),
        ("batch", None, None, "batch", False),  # nothing was asked for
        ("batch", None, "golden", "batch", False),
        ("interactive", None, "interactive", "interactive", False),
    ],
)
def test_a_class_above_that_of_the_key_is_lowered(
    highest: str, tier: str | None, header: str | None, service_class: str, capped: bool
) -> None:
    body = chat(service_tier=tier)
    headers = {} if header is None else {CLASS_HEADER: header}
    ordering = ordering_of(body, headers, Grant(highest_class=highest))
    assert (ordering.service_class, ordering.capped_class) == (service_class, capped)


@pytest.mark.parametrize(
    ("fields", "certain"),
    [
        ({}, 1),
        ({"min_tokens": 4}, 4),
        ({"ignore_eos": True}, 9),
        ({"ignore_eos": True, "stop": ["."]}, 1),
        ({"ignore_eos": True, "stop_token_ids": [5], "min_tokens": 3}, 3),
    ],
)
def test_output_that_nothing_can_spare(fields: dict[str, Any], certain: int) -> None:
    assert certain_tokens(chat(**fields), 9) == certain


@pytest.mark.parametrize(("value", "seconds"), [("1", 0.001), ("1500", 1.5), ("86400000", 86400)])
def test_timeout(value: str, seconds: float) -> None:
    assert ordering_of(chat(), {TIMEOUT_HEADER: value}, Grant()).timeout_s == seconds


@pytest.mark.parametrize(
    "value", ["", "0", "-1", "1.5", "1e3", " 1", "1\n", "86400001", "9" * 5000]
)
def test_bad_timeout(value: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ordering_of(chat(), {TIMEOUT_HEADER: value}, Grant())
    assert caught.value.param == TIMEOUT_HEADER


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, [0, 1, 2]),
        (41, [41, 42, 43]),
        (-1, [2**64 - 1, 0, 1]),
        (2**63 - 1, [2**63 - 1, 2**63, 2**63 + 1]),
    ],
)
def test_seeds_of_choices(seed: int, expected: Sequence[int]) -> None:
    assert seeds_of(chat(seed=seed), 3) == expected
    assert SamplingParams(seed=expected[0]).seed == expected[0]


def test_random_seeds_differ_between_requests() -> None:
    first, second = (seeds_of(chat(), 4) for _ in range(2))
    assert first != second
    assert all((b - a) % 2**64 == 1 for a, b in itertools.pairwise(first))
    assert all(0 <= seed < 2**64 for seed in first + second)
