"""API keys: `Authorization: Bearer KEY`."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from fastserve.gateway.errors import ApiError, InvalidRequestError


class ApiKeys:
    """The accepted keys. Without any, every request is accepted."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, authorization: str | None) -> ApiError | None:
        """Why a request with this header value is refused, None if it is not."""
        if not self._digests:
            return None
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return _refusal("no API key given: send it as `Authorization: Bearer KEY`")
        digest = _digest(key.strip().encode("latin-1", "replace"))
        # All of them, whichever matches, and digests of equal length: time tells nothing.
        if not any([hmac.compare_digest(digest, known) for known in self._digests]):  # noqa: C419
            return _refusal("incorrect API key provided")
        return None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _refusal(message: str) -> ApiError:
    return InvalidRequestError(
        message,
        status=401,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
