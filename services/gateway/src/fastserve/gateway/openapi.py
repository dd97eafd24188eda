"""The OpenAPI document. Bodies are read by hand (see `body`), so their schemas are added here."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from fastserve.gateway.schemas import (
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

_REF: Final = "#/components/schemas/"
_BODIES: Final = (ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
_KEY: Final = "ApiKey"
_ERROR: Final = "Error"
_ERROR_SCHEMA: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

Responses = dict[int | str, dict[str, Any]]


def _errors(**descriptions: str) -> Responses:
    content = {"application/json": {"schema": {"$ref": _REF + _ERROR}}}
    return {
        int(status.lstrip("_")): {"description": description, "content": content}
        for status, description in descriptions.items()
    }


BODY_ERRORS: Final = _errors(
    _400="The request makes no sense or asks for what is not supported",
    _401="No key, or a wrong one",
    _404="No such model",
    _413="The body is too large",
    _415="The body is not said to be JSON",
)
ANSWER_ERRORS: Final = BODY_ERRORS | _errors(
    _429="The queue is full: try again after Retry-After seconds",
    _500="An internal error",
    _503="No scheduler or no worker: try again after Retry-After seconds",
    _504="The deadline of the request passed or cannot be met",
)
KEY_ERRORS: Final = _errors(_401="No key, or a wrong one")
MODEL_ERRORS: Final = KEY_ERRORS | _errors(_404="No such model")
READY_ERRORS: Final = _errors(_503="No scheduler or no worker")


def body_of(model: type[Body]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes this body."""
    schema = {"$ref": _REF + model.__name__}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "security": [{_KEY: []}],
    }


def document(app: FastAPI) -> dict[str, Any]:
    """The whole document, made once."""
    if app.openapi_schema is None:
        spec = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        _, bodies = models_json_schema(
            [(model, "validation") for model in _BODIES], ref_template=_REF + "{model}"
        )
        components = spec.setdefault("components", {})
        components.setdefault("schemas", {}).update(bodies["$defs"], **{_ERROR: _ERROR_SCHEMA})
        components["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = spec
    return app.openapi_schema
