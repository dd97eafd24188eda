"""Reading a request body into its model, with errors that name the parameter."""

from __future__ import annotations

from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import ValidationError

from fastserve.gateway.errors import InvalidRequestError
from fastserve.gateway.schemas import Body

BodyT = TypeVar("BodyT", bound=Body)

_SHOWN = 100  # characters of a client's own words in a message
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported": "unsupported_parameter",
}


async def read_body(request: Request, model: type[BodyT]) -> BodyT:
    """The validated body. Raises `InvalidRequestError`."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise InvalidRequestError(
            "send the body as JSON with the header Content-Type: application/json", status=415
        )
    return parse_body(await request.body(), model)


def parse_body(body: bytes, model: type[BodyT]) -> BodyT:
    """Raises `InvalidRequestError`: not JSON, not UTF-8, unknown or wrong fields."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(
            f"the body is not valid JSON: {error}", code="invalid_json"
        ) from error
    if not isinstance(value, dict):
        raise InvalidRequestError("the body must be a JSON object", code="invalid_json")
    for name in value:
        if name not in model.model_fields:
            raise _unknown(name)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _invalid(first) from error


def _invalid(error: Any) -> InvalidRequestError:
    param = ".".join(str(part) for part in error["loc"])[:_SHOWN]
    code = _CODES.get(error["type"], "invalid_value")
    if code == "unknown_parameter":
        return _unknown(param)
    if code == "missing_required_parameter":
        return InvalidRequestError(f"missing required parameter: {param}", param=param, code=code)
    return InvalidRequestError(f"{param}: {error['msg']}", param=param, code=code)


def _unknown(name: str) -> InvalidRequestError:
    name = name[:_SHOWN]
    return InvalidRequestError(f"unknown parameter: {name}", param=name, code="unknown_parameter")
