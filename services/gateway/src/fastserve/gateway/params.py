"""From a validated request to what the jobs need: sampling parameters, limits, class, deadline.

Checks that need more than one field, the vocabulary or the model's length are made here.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fastserve.gateway.answer_ids import shard_of
from fastserve.gateway.errors import InvalidRequestError
from fastserve.gateway.schemas import ChatCompletionRequest, GenerationBody
from fastserve.gateway.tokenizer import Tokenizer
from fastserve.proto.v1.sampling_pb2 import SamplingParams

CLASS_HEADER: Final = "x-fastserve-class"
TENANT_HEADER: Final = "x-fastserve-tenant"
FAIRNESS_HEADER: Final = "x-llm-d-inference-fairness-id"  # the same, as llm-d calls it
TIMEOUT_HEADER: Final = "x-request-timeout-ms"
ANSWER_HEADER: Final = "x-fastserve-answer"
LAST_EVENT_HEADER: Final = "last-event-id"

DEFAULT_CLASS: Final = "default"
CLASSES: Final = ("interactive", DEFAULT_CLASS, "batch")  # the highest first
_CLASS_OF_TIER: Final = {
    None: DEFAULT_CLASS,
    "auto": DEFAULT_CLASS,
    "default": DEFAULT_CLASS,
    "priority": "interactive",
    "flex": "batch",
}
_TIER_OF_CLASS: Final = {"interactive": "priority", DEFAULT_CLASS: "default", "batch": "flex"}
TENANT: Final = re.compile(r"[\x21-\x7e]{1,128}")
_MAX_TIMEOUT_MS: Final = 24 * 3600 * 1000
_COMPLETION_MAX_TOKENS: Final = 16  # OpenAI's default


@dataclass(frozen=True)
class Grant:
    """What requests with an API key may ask for. `tenant` None: they name it themselves."""

    tenant: str | None = None
    highest_class: str = CLASSES[0]
    weight: float = 1.0


@dataclass(frozen=True)
class Ordering:
    """What the scheduler needs to know about a request beside its tokens."""

    tenant: str
    tenant_weight: float
    service_class: str
    priority: int
    timeout_s: float | None
    unknown_class: bool  # the class header named none that exists; the default is used
    capped_class: bool  # the request asked for a higher class than its key grants


def ordering_of(body: GenerationBody, headers: Mapping[str, str], grant: Grant) -> Ordering:
    """Class, tenant, priority and deadline, as far as the key grants them.

    The class header beats `service_tier`. An unknown class is not an error: clients may name
    classes that another deployment has. A class above that of the key is lowered. Raises
    `InvalidRequestError`, with 403 for a tenant that the key does not stand for.
    """
    named = headers.get(CLASS_HEADER)
    asked = _CLASS_OF_TIER[body.service_tier]
    if named is not None:
        asked = named if named in CLASSES else DEFAULT_CLASS
    lowered = CLASSES.index(asked) < CLASSES.index(grant.highest_class)
    return Ordering(
        tenant=_tenant(headers, grant),
        tenant_weight=grant.weight,
        service_class=grant.highest_class if lowered else asked,
        priority=body.priority or 0,
        timeout_s=_timeout(headers.get(TIMEOUT_HEADER)),
        unknown_class=named is not None and named not in CLASSES,
        capped_class=lowered and (named in CLASSES or body.service_tier is not None),
    )


def _tenant(headers: Mapping[str, str], grant: Grant) -> str:
    """Our own header beats llm-d's. A key's tenant is not silently put in the place of another:
    the client would believe that the work counts for someone for whom it does not."""
    header = TENANT_HEADER if TENANT_HEADER in headers else FAIRNESS_HEADER
    named = headers.get(header)
    if named is not None and not TENANT.fullmatch(named):
        raise InvalidRequestError(
            f"{header} must be 1 to 128 printable ASCII characters", param=header
        )
    if grant.tenant is None:
        return named or "default"
    if named not in (None, grant.tenant):
        raise InvalidRequestError(
            "the API key belongs to another tenant",
            status=403,
            param=header,
            code="tenant_not_allowed",
        )
    return grant.tenant


def tier_of(body: GenerationBody, ordering: Ordering) -> str | None:
    """The `service_tier` that the answer reports, if the request asked for one."""
    return None if body.service_tier is None else _TIER_OF_CLASS[ordering.service_class]


def _timeout(value: str | None) -> float | None:
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", value) or not 1 <= int(value) <= _MAX_TIMEOUT_MS:
        raise InvalidRequestError(
            f"{TIMEOUT_HEADER} must be milliseconds from 1 to {_MAX_TIMEOUT_MS}",
            param=TIMEOUT_HEADER,
        )
    return int(value) / 1000


def sampling_of(body: GenerationBody, tokenizer: Tokenizer) -> SamplingParams:
    """Sampling parameters without seed and max_tokens. Raises `InvalidRequestError`."""
    bias_ids = []
    for key in body.logit_bias or {}:
        if not re.fullmatch(r"[0-9]{1,10}", key) or not tokenizer.knows(int(key)):
            raise InvalidRequestError(
                f"logit_bias: {key[:20]!r} is not a token id of the vocabulary", param="logit_bias"
            )
        bias_ids.append(int(key))
    check_vocabulary(body.stop_token_ids or [], tokenizer, "stop_token_ids")
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias_ids=bias_ids,
        logit_bias_values=list((body.logit_bias or {}).values()),
        min_tokens=body.min_tokens or 0,
        stop_token_ids=body.stop_token_ids or [],
        ignore_eos=bool(body.ignore_eos),
    )


def check_vocabulary(token_ids: Sequence[int], tokenizer: Tokenizer, param: str) -> None:
    """Raises `InvalidRequestError` for an id that is not in the vocabulary."""
    for token_id in token_ids:
        if not tokenizer.knows(token_id):
            raise InvalidRequestError(
                f"{param}: {token_id} is not a token id of the vocabulary", param=param
            )


def asked_max_tokens(body: GenerationBody) -> tuple[int | None, str]:
    """The output limit that the request gives, if any, and the field it stands in."""
    if not isinstance(body, ChatCompletionRequest) or body.max_completion_tokens is None:
        return body.max_tokens, "max_tokens"
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise InvalidRequestError(
            "max_tokens and max_completion_tokens differ: give one of them",
            param="max_completion_tokens",
        )
    return body.max_completion_tokens, "max_completion_tokens"


def max_tokens_of(body: GenerationBody, prompt_tokens: int, longest: int, prompt_param: str) -> int:
    """Output limit of a job. `longest`: tokens that prompt and output may have together.

    Default: what remains for chat, 16 for completions (or what remains, if that is less).
    Raises `InvalidRequestError` if the prompt or the limit cannot fit.
    """
    asked, param = asked_max_tokens(body)
    left = longest - prompt_tokens
    if left < 1:
        raise InvalidRequestError(
            f"the prompt has {prompt_tokens} tokens, but prompt and answer together may have at "
            f"most {longest}",
            param=prompt_param,
            code="context_length_exceeded",
        )
    if asked is None:
        limit = left if isinstance(body, ChatCompletionRequest) else _COMPLETION_MAX_TOKENS
        asked = min(limit, left)
    if asked > left:
        raise InvalidRequestError(
            f"{param} is {asked}, but with a prompt of {prompt_tokens} tokens at most {left} fit "
            f"({longest} in all)",
            param=param,
            code="context_length_exceeded",
        )
    if (body.min_tokens or 0) > asked:
        raise InvalidRequestError(
            f"min_tokens is greater than the limit of {asked} tokens", param="min_tokens"
        )
    return asked


def certain_tokens(body: GenerationBody, max_tokens: int) -> int:
    """Output tokens of a job with this limit that nothing can spare: no stop string, no token."""
    if body.ignore_eos and not body.stop and not body.stop_token_ids:
        return max_tokens
    return max(1, body.min_tokens or 0)


@dataclass(frozen=True)
class Resume:
    """An answer whose connection broke, and how much of each choice the client has."""

    response_id: str
    seen: Sequence[int]  # tokens, by choice


def resume_of(body: GenerationBody, headers: Mapping[str, str], choices: int) -> Resume | None:
    """What the client wants to go on with, if anything. Raises `InvalidRequestError`.

    It sends the request once more, with the `id` of the answer and the last SSE id that it has.
    """
    response_id = headers.get(ANSWER_HEADER)
    if response_id is None:
        return None
    if not body.stream:
        raise InvalidRequestError("only streams can be gone on with", param="stream")
    if shard_of(response_id) is None:
        raise InvalidRequestError(f"{ANSWER_HEADER} is no id of an answer", param=ANSWER_HEADER)
    last = headers.get(LAST_EVENT_HEADER, ",".join(["-1"] * choices))
    parts = last.split(",")
    if len(parts) != choices or not all(re.fullmatch(r"-1|[0-9]{1,9}", part) for part in parts):
        raise InvalidRequestError(
            f"{LAST_EVENT_HEADER} must have one token index per choice", param=LAST_EVENT_HEADER
        )
    return Resume(response_id, [int(part) + 1 for part in parts])


def seeds_of(body: GenerationBody, count: int) -> list[int]:
    """One seed per choice of a prompt, `seed + i`; random if the request gives none."""
    first = secrets.randbits(63) if body.seed is None else body.seed
    return [(first + at) % 2**64 for at in range(count)]
