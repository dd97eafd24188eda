"""Errors as OpenAI clients expect them: `{"error": {"message", "type", "param", "code"}}`.

ApiError
├── InvalidRequestError     400  the request makes no sense or asks for what is not supported
├── ClientGoneError         499  nobody reads the answer any more (log and metrics only)
├── OverloadedError         429  the queue is full: try again later
├── UnavailableError        503  nobody there to do the work: try again later
├── DeadlineError           504  the request's own deadline passed, or cannot be met any more
└── InternalError           500  our fault
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.responses import Response


class ApiError(Exception):
    """An answer other than success; `message` is meant for the client."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = self.status if status is None else status
        self.type = self.type if type is None else type
        self.param = param
        self.code = self.code if code is None else code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error as JSON."""
        return orjson.dumps(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def response(self) -> Response:
        return Response(
            self.body(), self.status, headers=self.headers, media_type="application/json"
        )


class InvalidRequestError(ApiError):
    """400, or another status of the 4xx family that the caller can mend."""

    status = 400
    type = "invalid_request_error"


class ClientGoneError(ApiError):
    """The client closed the connection before its answer was complete."""

    status = 499
    type = "client_closed_request"
    code = "client_closed_request"

    def __init__(self) -> None:
        super().__init__("the client closed the connection")


class OverloadedError(ApiError):
    """429."""

    status = 429
    type = "rate_limit_exceeded"
    code = "queue_full"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message, headers={"Retry-After": str(max(1, retry_after_s))})


class UnavailableError(ApiError):
    """503; `code` says who is missing."""

    status = 503
    type = "service_unavailable"

    def __init__(self, message: str, code: str, retry_after_s: int = 1) -> None:
        super().__init__(message, code=code, headers={"Retry-After": str(max(1, retry_after_s))})


class DeadlineError(ApiError):
    """504."""

    status = 504
    type = "timeout"
    code = "deadline_exceeded"

    def __init__(self, message: str = "") -> None:
        super().__init__(
            message or "the deadline of the request passed before the answer was complete"
        )


class InternalError(ApiError):
    """500; details go to the log, never to the client."""

    code = "internal_error"

    def __init__(self, message: str = "an internal error occurred") -> None:
        super().__init__(message)
