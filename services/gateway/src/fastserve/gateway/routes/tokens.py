"""POST /tokenize and POST /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from fastserve.gateway.body import read_body
from fastserve.gateway.errors import InvalidRequestError
from fastserve.gateway.openapi import BODY_ERRORS, body_of
from fastserve.gateway.params import check_vocabulary
from fastserve.gateway.routes.chat import chat_prompt
from fastserve.gateway.schemas import DetokenizeRequest, TokenizeRequest
from fastserve.gateway.state import authorized, gateway_of
from fastserve.gateway.tokenizer import Tokenizer

router = APIRouter(dependencies=[Depends(authorized)], tags=["Tokens"])


@router.post(
    "/tokenize",
    summary="Token ids of a text or a conversation",
    openapi_extra=body_of(TokenizeRequest),
    responses=BODY_ERRORS,
)
async def tokenize(request: Request) -> dict[str, Any]:
    body = await read_body(request, TokenizeRequest)
    gateway = gateway_of(request)
    if body.model is not None:
        gateway.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give either prompt or messages", param="prompt")
    tokens = await gateway.pool.run(lambda: _tokens(gateway.tokenizer, body))
    return {"count": len(tokens), "max_model_len": gateway.max_model_len, "tokens": tokens}


def _tokens(tokenizer: Tokenizer, body: TokenizeRequest) -> list[int]:
    if body.messages is None:
        text, special = body.prompt or "", body.add_special_tokens
        return tokenizer.encode(text, add_special_tokens=special is not False)
    return chat_prompt(
        tokenizer,
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        add_special_tokens=bool(body.add_special_tokens),
    )


@router.post(
    "/detokenize",
    summary="The text of token ids, special tokens left out",
    openapi_extra=body_of(DetokenizeRequest),
    responses=BODY_ERRORS,
)
async def detokenize(request: Request) -> dict[str, str]:
    body = await read_body(request, DetokenizeRequest)
    gateway = gateway_of(request)
    if body.model is not None:
        gateway.check_model(body.model)
    check_vocabulary(sorted(set(body.tokens)), gateway.tokenizer, "tokens")
    return {"prompt": await gateway.pool.run(lambda: gateway.tokenizer.decode(body.tokens))}
