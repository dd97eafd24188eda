"""GET /v1/models: the one model that is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from fastserve.gateway.openapi import KEY_ERRORS, MODEL_ERRORS
from fastserve.gateway.state import Gateway, authorized, gateway_of

router = APIRouter(dependencies=[Depends(authorized)], tags=["OpenAI"])


@router.get("/v1/models", summary="List the models", responses=KEY_ERRORS)
async def list_models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_card(gateway_of(request))]}


# Names may hold slashes: organisation/model.
@router.get("/v1/models/{model:path}", summary="Show a model", responses=MODEL_ERRORS)
async def get_model(request: Request, model: str) -> dict[str, Any]:
    gateway = gateway_of(request)
    gateway.check_model(model)
    return _card(gateway)


def _card(gateway: Gateway) -> dict[str, Any]:
    return {
        "id": gateway.model_name,
        "object": "model",
        "created": gateway.created,
        "owned_by": "fastserve",
        "max_model_len": gateway.max_model_len,
    }
