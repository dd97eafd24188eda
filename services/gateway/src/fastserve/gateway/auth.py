"""API keys: `Authorization: Bearer KEY`, and what a key grants.

A line of a key file is a key and, after it, its properties:

    s3cr3t tenant=acme class=default weight=2   # a comment

tenant: whose requests these are, whatever their headers say; class: the highest service class they
get; weight: the tenant's share of service among the tenants of a class. A key alone grants
everything to whatever tenant the request names.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from fastserve.gateway.errors import InvalidRequestError
from fastserve.gateway.params import CLASSES, TENANT, Grant

_WEIGHTS: Final = (0.001, 1000.0)


@dataclass(frozen=True)
class ApiKey:
    """A key and what it grants."""

    key: str
    grant: Grant = field(default_factory=Grant)


def parse_key(line: str) -> ApiKey | None:
    """A line of a key file; None for one without a key.

    Raises ValueError with what is wrong, which never tells the key.
    """
    words = re.sub(r"(^|\s)#.*", "", line).split()
    if not words:
        return None
    properties: dict[str, str] = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if not equals or name not in ("tenant", "class", "weight"):
            raise ValueError("after the key there may be tenant=NAME, class=NAME and weight=NUMBER")
        if name in properties:
            raise ValueError(f"{name} is given twice")
        properties[name] = value
    tenant = properties.get("tenant")
    if tenant is not None and not TENANT.fullmatch(tenant):
        raise ValueError("a tenant has 1 to 128 printable ASCII characters")
    highest_class = properties.get("class", CLASSES[0])
    if highest_class not in CLASSES:
        raise ValueError(f"class must be one of {', '.join(CLASSES)}")
    return ApiKey(words[0], Grant(tenant, highest_class, _weight(properties.get("weight", "1"))))


def _weight(text: str) -> float:
    least, most = _WEIGHTS
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not least <= weight <= most:
        raise ValueError(f"weight must be a number from {least:g} to {most:g}")
    return weight


class ApiKeys:
    """The accepted keys. Without any, every request is accepted."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._grants = [(_digest(key.key.encode()), key.grant) for key in keys]

    def grant(self, authorization: str | None) -> Grant:
        """What a request with this header value may ask for.

        Raises `InvalidRequestError` (401) if it is refused.
        """
        if not self._grants:
            return Grant()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _refusal("no API key given: send it as `Authorization: Bearer KEY`")
        digest = _digest(key.strip().encode("latin-1", "replace"))
        # All of them, whichever matches, and digests of equal length: time tells nothing.
        found = [grant for known, grant in self._grants if hmac.compare_digest(digest, known)]
        if not found:
            raise _refusal("incorrect API key provided")
        return found[0]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _refusal(message: str) -> InvalidRequestError:
    return InvalidRequestError(
        message,
        status=401,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
