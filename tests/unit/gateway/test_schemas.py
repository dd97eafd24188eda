"""Every field of every body: what it accepts, where its bounds are, how a refusal names it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.gateway.body import parse_body
from fastserve.gateway.errors import InvalidRequestError
from fastserve.gateway.schemas import (
    MAX_LOGIT_BIAS,
    MAX_STOP_LENGTH,
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

HI = {"role": "user", "content": "Hi"}
REQUIRED: dict[type[Body], dict[str, Any]] = {
    ChatCompletionRequest: {"model": "m", "messages": [HI]},
    CompletionRequest: {"model": "m", "prompt": "Once"},
    TokenizeRequest: {},
    DetokenizeRequest: {"tokens": [1]},
}
BODIES = list(REQUIRED)
GENERATION = [ChatCompletionRequest, CompletionRequest]
FIELDS = [(body, name) for body in BODIES for name in body.model_fields]


def parse(body: type[Body], **fields: Any) -> Any:
    return parse_body(json.dumps(REQUIRED[body] | fields).encode(), body)


def refused(body: type[Body], **fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse(body, **fields)
    assert caught.value.status == 400
    assert caught.value.type == "invalid_request_error"
    return caught.value


def assert_refused(
    body: type[Body], fields: dict[str, Any], param: str, code: str = "invalid_value"
) -> None:
    error = refused(body, **fields)
    assert (error.param, error.code) == (param, code)
    assert param in error.message


# Least and greatest value, the step to the first value outside, None: no bound on that side.
BOUNDS: list[tuple[str, float | None, float | None, float]] = [
    ("n", 1, None, 1),
    ("seed", -(2**63), 2**63 - 1, 1),
    ("temperature", 0, 2, 0.01),
    ("top_p", 1e-6, 1, 1e-7),
    ("top_k", -1, 2**31 - 1, 1),
    ("min_p", 0, 1, 0.01),
    ("presence_penalty", -2, 2, 0.01),
    ("frequency_penalty", -2, 2, 0.01),
    ("repetition_penalty", 0.01, 100, 0.001),
    ("max_tokens", 1, None, 1),
    ("min_tokens", 0, None, 1),
    ("priority", -(2**31), 2**31 - 1, 1),
]


@pytest.mark.parametrize("body", GENERATION)
@pytest.mark.parametrize(("name", "least", "greatest", "step"), BOUNDS)
def test_bounds(
    body: type[Body], name: str, least: float | None, greatest: float | None, step: float
) -> None:
    for bound, outside in ((least, -step), (greatest, step)):
        if bound is not None:
            assert getattr(parse(body, **{name: bound}), name) == bound
            assert_refused(body, {name: bound + outside}, name)


@pytest.mark.parametrize(
    ("body", "name", "least", "greatest"),
    [
        (ChatCompletionRequest, "top_logprobs", 0, 20),
        (CompletionRequest, "logprobs", 0, 20),
        (ChatCompletionRequest, "max_completion_tokens", 1, None),
    ],
)
def test_bounds_of_single_bodies(
    body: type[Body], name: str, least: int, greatest: int | None
) -> None:
    assert getattr(parse(body, **{name: least}), name) == least
    assert_refused(body, {name: least - 1}, name)
    if greatest is not None:
        assert getattr(parse(body, **{name: greatest}), name) == greatest
        assert_refused(body, {name: greatest + 1}, name)


@pytest.mark.parametrize(("body", "name"), FIELDS)
def test_null_means_the_default(body: type[Body], name: str) -> None:
    if name in REQUIRED[body]:
        assert refused(body, **{name: None}).param == name
    else:
        assert parse(body, **{name: None}) == parse(body)


@pytest.mark.parametrize(("body", "name"), FIELDS)
@pytest.mark.parametrize("value", [{"no": ["such"]}, [[[]]], 1.5e300], ids=str)
def test_wrong_types_are_refused_by_name(body: type[Body], name: str, value: Any) -> None:
    error = refused(body, **{name: value})
    assert (error.param or "").partition(".")[0] == name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": "2"}, "n"),
        ({"n": 1.0}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"ignore_eos": 0}, "ignore_eos"),
        ({"user": 7}, "user"),
        ({"model": ""}, "model"),
        ({"model": 7}, "model"),
        ({"service_tier": "scale"}, "service_tier"),
        ({"stop": 7}, "stop"),
        ({"stop": ""}, "stop.0"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": ["a", 7]}, "stop.1"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": "x" * (MAX_STOP_LENGTH + 1)}, "stop.0"),
        ({"stop_token_ids": [1, "2"]}, "stop_token_ids.1"),
        ({"stop_token_ids": list(range(129))}, "stop_token_ids"),
        ({"logit_bias": {"5": 100.5}}, "logit_bias.5"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
        ({"logit_bias": {str(at): 1 for at in range(MAX_LOGIT_BIAS + 1)}}, "logit_bias"),
        ({"stream_options": True}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("body", GENERATION)
def test_wrong_values_are_not_converted(
    body: type[Body], fields: dict[str, Any], param: str
) -> None:
    assert_refused(body, fields, param)


def test_what_is_at_the_limit_passes() -> None:
    bias = {str(at): -100 for at in range(MAX_LOGIT_BIAS)}
    body = parse(
        ChatCompletionRequest,
        stop=["x" * MAX_STOP_LENGTH, "b", "c", "d"],
        stop_token_ids=list(range(128)),
        logit_bias=bias,
        temperature=1,
    )
    assert (len(body.stop), len(body.stop_token_ids)) == (4, 128)
    assert body.logit_bias == bias
    assert parse(CompletionRequest, stop="\n").stop == ["\n"]


CHANGES_NOTHING: list[tuple[type[Body], str, Any, Any]] = [
    (ChatCompletionRequest, "response_format", {"type": "text"}, None),
    (ChatCompletionRequest, "store", False, True),
    (ChatCompletionRequest, "parallel_tool_calls", False, None),
    (ChatCompletionRequest, "parallel_tool_calls", True, None),
    (ChatCompletionRequest, "modalities", ["text"], ["text", "audio"]),
    (ChatCompletionRequest, "tools", [], [{"type": "function", "function": {"name": "f"}}]),
    (ChatCompletionRequest, "tool_choice", "none", "auto"),
    (ChatCompletionRequest, "functions", [], [{"name": "f"}]),
    (ChatCompletionRequest, "function_call", "none", {"name": "f"}),
    (ChatCompletionRequest, "stream_options", {"include_obfuscation": False}, None),
    (ChatCompletionRequest, "metadata", {"label": "a"}, None),
    (ChatCompletionRequest, "safety_identifier", "u", None),
    (ChatCompletionRequest, "prompt_cache_key", "k", None),
    (ChatCompletionRequest, "user", "u", None),
    (CompletionRequest, "best_of", 1, 2),
    (CompletionRequest, "best_of", 1, True),
    (CompletionRequest, "echo", True, None),
]


@pytest.mark.parametrize(("body", "name", "accepted", "unsupported"), CHANGES_NOTHING)
def test_values_that_change_nothing_pass_and_others_are_refused(
    body: type[Body], name: str, accepted: Any, unsupported: Any
) -> None:
    assert getattr(parse(body, **{name: accepted}), name) is not None
    if unsupported is not None:
        assert_refused(body, {name: unsupported}, name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("body", "fields", "param"),
    [
        *[
            (ChatCompletionRequest, {name: "x"}, name)
            for name in (
                *("audio", "prediction", "prompt_cache_retention", "reasoning_effort"),
                *("verbosity", "web_search_options"),
            )
        ],
        (CompletionRequest, {"suffix": "x"}, "suffix"),
        (
            ChatCompletionRequest,
            {"response_format": {"type": "json_object"}},
            "response_format.type",
        ),
        (
            ChatCompletionRequest,
            {"stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
    ],
)
def test_unsupported_fields_are_refused(
    body: type[Body], fields: dict[str, Any], param: str
) -> None:
    assert_refused(body, fields, param, "unsupported_parameter")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("tools", [{"type": "function"}], "tools: this parameter is not supported"),
        ("audio", {}, "audio: this parameter is not supported"),
        ("store", True, "store: only false is supported"),
        ("modalities", ["audio"], 'modalities: only ["text"] is supported'),
    ],
)
def test_refusals_say_what_would_pass(name: str, value: Any, words: str) -> None:
    assert refused(ChatCompletionRequest, **{name: value}).message == words


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", ["max_token", "Model", "model_config", "__class__", "näh", ""])
def test_unknown_fields_are_refused(body: type[Body], name: str) -> None:
    assert_refused(body, {name: None}, name, "unknown_parameter")


@pytest.mark.parametrize(
    ("body", "name"), [(body, name) for body in BODIES for name in REQUIRED[body]]
)
def test_missing_fields(body: type[Body], name: str) -> None:
    fields = {key: value for key, value in REQUIRED[body].items() if key != name}
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(json.dumps(fields).encode(), body)
    assert (caught.value.param, caught.value.code) == (name, "missing_required_parameter")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(field=st.sampled_from(FIELDS), value=JSON)
def test_any_json_is_accepted_or_refused_with_its_field(
    field: tuple[type[Body], str], value: Any
) -> None:
    body, name = field
    try:
        parse(body, **{name: value})
    except InvalidRequestError as error:
        assert (error.param or "").startswith(name)
        assert error.status == 400
