"""Request bodies. What is not listed here is refused, and so is what is listed but not supported.

Every optional field may be null, which means its default, as in OpenAI's API. Fields whose only
accepted values change nothing are spelled out at the end of each body: accepting them is truthful
(`store: false`), another value is refused by name (`store: true`), never ignored.

Hints that OpenAI itself only uses for abuse detection and caching (`user`, `safety_identifier`,
`prompt_cache_key`) are accepted: the answer does not depend on them. So is `metadata`, which
labels stored answers, of which there are none.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_LENGTH = 1024  # characters; every choice prepares to find them
INT32 = (-(2**31), 2**31 - 1)
INT64 = (-(2**63), 2**63 - 1)


def _only(*accepted: object) -> BeforeValidator:
    """Accept these values and refuse every other one as not supported."""

    def check(value: object) -> object:
        if any(type(value) is type(known) and value == known for known in accepted):
            return value
        shown = [known for known in accepted if known is not None and known != []]
        if not shown:
            raise PydanticCustomError("unsupported", "this parameter is not supported")
        # JSON as the client writes it; braces would be placeholders in the template.
        values = ", ".join(json.dumps(known) for known in shown)
        raise PydanticCustomError("unsupported", "only {values} is supported", {"values": values})

    return BeforeValidator(check)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "must be a string or a list of text parts")
    return value


def _text_part_only(value: object) -> object:
    if isinstance(value, str) and value != "text":
        raise PydanticCustomError(
            "unsupported", "content parts of this type are not supported, only text is"
        )
    return value


def _role(value: object) -> object:
    if value in ("tool", "function"):
        raise PydanticCustomError("unsupported", "tool messages are not supported")
    return value


def _prompts(value: object) -> object:
    """OpenAI's four forms of `prompt`, all as a list of texts and token id lists."""
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not all(
        isinstance(prompt, str)
        or (isinstance(prompt, list) and all(type(token) is int for token in prompt))
        for prompt in value
    ):
        raise PydanticCustomError(
            "prompt_type",
            "must be a string, a list of strings, a list of token ids or a list of such lists",
        )
    if not value or not all(value):
        raise PydanticCustomError("prompt_empty", "must not be empty")
    return value


NonEmpty = Annotated[str, StringConstraints(min_length=1)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]
Refused = Annotated[None, _only(None)]
Prompt = str | list[int]


class Body(BaseModel):
    """No unknown fields, no conversions (a number in a string is a string), no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    """How a streamed answer looks."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Literal[False] | None, _only(None, False)] = None


class TextFormat(Body):
    """The only form of answer there is."""

    type: Annotated[Literal["text"], _only("text")]


class GenerationBody(Body):
    """What chat and text completions have in common."""

    model: NonEmpty
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1)
    stop: Annotated[
        list[StopString] | None,
        Field(max_length=4),
        BeforeValidator(_as_list, json_schema_input_type=str | list[str] | None),
    ] = None
    seed: int | None = Field(default=None, ge=INT64[0], le=INT64[1])
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=1e-6, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=INT32[1], description="0 or -1: off")
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=MAX_LOGIT_BIAS, description="by token id"
    )
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=128)
    priority: int | None = Field(
        default=None, ge=INT32[0], le=INT32[1], description="lower is sooner"
    )
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    user: str | None = None


class TextPart(Body):
    """A part of a message."""

    type: Annotated[Literal["text"], BeforeValidator(_text_part_only)]
    text: str


class Message(Body):
    """One message of a conversation."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_role)]
    content: Annotated[
        list[TextPart],
        Field(min_length=1, fail_fast=True),
        BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart]),
    ]
    # What clients send along when they hand an answer back.
    name: Refused = None
    refusal: Refused = None
    audio: Refused = None
    function_call: Refused = None
    annotations: Annotated[list[Any] | None, _only(None, [])] = None
    tool_calls: Annotated[list[Any] | None, _only(None, [])] = None
    tool_call_id: Refused = None

    @property
    def text(self) -> str:
        """Its parts, one a line."""
        return "\n".join(part.text for part in self.content)


class ChatCompletionRequest(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None

    response_format: TextFormat | None = None
    store: Annotated[Literal[False] | None, _only(None, False)] = None
    parallel_tool_calls: bool | None = None  # there are no tools to call in either way
    modalities: Annotated[list[Literal["text"]] | None, _only(None, ["text"])] = None
    tools: Annotated[list[Any] | None, _only(None, [])] = None
    tool_choice: Annotated[Literal["none"] | None, _only(None, "none")] = None
    functions: Annotated[list[Any] | None, _only(None, [])] = None
    function_call: Annotated[Literal["none"] | None, _only(None, "none")] = None
    audio: Refused = None
    prediction: Refused = None
    prompt_cache_retention: Refused = None
    reasoning_effort: Refused = None
    verbosity: Refused = None
    web_search_options: Refused = None


class CompletionRequest(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[
        list[Prompt],
        BeforeValidator(
            _prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
    ]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None

    best_of: Annotated[Literal[1] | None, _only(None, 1)] = None
    suffix: Refused = None


class TokenizeRequest(Body):
    """POST /tokenize: a text or a conversation."""

    model: NonEmpty | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, fail_fast=True)
    add_special_tokens: bool | None = Field(
        default=None, description="default: true for a prompt, false for messages"
    )
    add_generation_prompt: bool | None = Field(default=None, description="default: true")


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: NonEmpty | None = None
    tokens: list[int] = Field(fail_fast=True)
