"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fastserve.gateway import semconv
from fastserve.gateway.answers import AnswerFormat, CompletionFormat, Head
from fastserve.gateway.body import read_body
from fastserve.gateway.errors import InvalidRequestError
from fastserve.gateway.openapi import ANSWER_ERRORS, body_of
from fastserve.gateway.params import check_vocabulary
from fastserve.gateway.routes.generate import Endpoint, Prompts, respond
from fastserve.gateway.schemas import CompletionRequest, Prompt
from fastserve.gateway.state import authorized, gateway_of
from fastserve.gateway.tokenizer import Tokenizer

router = APIRouter(dependencies=[Depends(authorized)], tags=["OpenAI"])


@router.post(
    "/v1/completions",
    summary="Continue a text",
    openapi_extra=body_of(CompletionRequest),
    responses=ANSWER_ERRORS,
)
async def create_completion(request: Request) -> Response:
    """Streamed as server-sent events with `stream: true`."""
    body = await read_body(request, CompletionRequest)
    gateway = gateway_of(request)
    tokenizer = gateway.tokenizer
    if len(body.prompt) > gateway.settings.max_prompts:
        raise InvalidRequestError(
            f"a request may carry at most {gateway.settings.max_prompts} prompts", param="prompt"
        )
    if body.echo and body.logprobs is not None:
        raise InvalidRequestError(
            "log-probabilities of the prompt are not supported: leave out echo or logprobs",
            param="echo",
            code="unsupported_parameter",
        )

    def make_format(head: Head, prompts: Prompts) -> AnswerFormat:
        echoes = None
        if body.echo:
            texts = [
                given if isinstance(given, str) else tokenizer.decode(prompt)
                for given, prompt in zip(body.prompt, prompts, strict=True)
            ]
            echoes = [text for text in texts for _ in range(body.n or 1)]
        return CompletionFormat(head, tokenizer.pieces, logprobs=body.logprobs, echoes=echoes)

    return await respond(
        request,
        body,
        Endpoint(
            operation=semconv.TEXT_COMPLETION,
            id_prefix="cmpl",
            prompts=len(body.prompt),
            prompt_param="prompt",
            make_prompts=lambda: [_prompt_tokens(tokenizer, prompt) for prompt in body.prompt],
            make_format=make_format,
            logprobs=body.logprobs,
            continuation=True,
        ),
    )


def _prompt_tokens(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a prompt. Raises `InvalidRequestError`."""
    if isinstance(prompt, list):
        check_vocabulary(sorted(set(prompt)), tokenizer, "prompt")
        return prompt
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise InvalidRequestError("the prompt has no tokens", param="prompt", code="invalid_value")
    return tokens
