"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fastserve.gateway import semconv
from fastserve.gateway.answers import ChatFormat
from fastserve.gateway.body import read_body
from fastserve.gateway.chat_template import TemplateRefusedError
from fastserve.gateway.errors import InvalidRequestError
from fastserve.gateway.openapi import ANSWER_ERRORS, body_of
from fastserve.gateway.routes.generate import Endpoint, respond
from fastserve.gateway.schemas import ChatCompletionRequest, Message
from fastserve.gateway.state import authorized, gateway_of
from fastserve.gateway.tokenizer import Tokenizer

router = APIRouter(dependencies=[Depends(authorized)], tags=["OpenAI"])


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    openapi_extra=body_of(ChatCompletionRequest),
    responses=ANSWER_ERRORS,
)
async def create_chat_completion(request: Request) -> Response:
    """Streamed as server-sent events with `stream: true`."""
    body = await read_body(request, ChatCompletionRequest)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError(
            "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value"
        )
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    tokenizer = gateway_of(request).tokenizer
    return await respond(
        request,
        body,
        Endpoint(
            operation=semconv.CHAT,
            id_prefix="chatcmpl",
            prompts=1,
            prompt_param="messages",
            make_prompts=lambda: [chat_prompt(tokenizer, body.messages)],
            make_format=lambda head, _: ChatFormat(head, tokenizer.pieces, logprobs=logprobs),
            logprobs=logprobs,
            continuation=False,
        ),
    )


def chat_prompt(
    tokenizer: Tokenizer,
    messages: list[Message],
    *,
    add_generation_prompt: bool = True,
    add_special_tokens: bool = False,
) -> list[int]:
    """Token ids of a conversation. Raises `InvalidRequestError`."""
    if not tokenizer.has_chat_template:
        raise InvalidRequestError(
            "this model has no chat template: use /v1/completions", param="messages"
        )
    # Models know a system role; "developer" is OpenAI's newer word for it.
    roles = {"developer": "system"}
    try:
        return tokenizer.encode_chat(
            [
                {"role": roles.get(message.role, message.role), "content": message.text}
                for message in messages
            ],
            add_generation_prompt=add_generation_prompt,
            add_special_tokens=add_special_tokens,
        )
    except TemplateRefusedError as error:
        raise InvalidRequestError(
            f"the chat template of the model refuses these messages: {error}", param="messages"
        ) from error
