"""What all requests share."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from fastapi import Request

from fastserve.gateway.auth import ApiKeys
from fastserve.gateway.errors import InvalidRequestError, UnavailableError
from fastserve.gateway.metrics import Metrics
from fastserve.gateway.params import Grant
from fastserve.gateway.settings import GatewaySettings
from fastserve.gateway.shards import Shards
from fastserve.gateway.tokenizer import Tokenizer, TokenizerPool


@dataclass(frozen=True)
class Gateway:
    """The parts of a gateway."""

    settings: GatewaySettings
    shards: Shards
    pool: TokenizerPool
    metrics: Metrics
    keys: ApiKeys
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time
    draining: asyncio.Event = field(default_factory=asyncio.Event)  # it is about to end

    @property
    def tokenizer(self) -> Tokenizer:
        return self.pool.tokenizer

    @property
    def model_name(self) -> str:
        """The name in requests and answers: as configured, else as the workers call it."""
        return self.settings.served_model_name or self.shards.model or self.settings.model_name

    @property
    def max_model_len(self) -> int | None:
        """Tokens that prompt and answer may have together; None while no worker is known."""
        return self.shards.max_job_tokens or None

    def check_open(self) -> None:
        """Raises `UnavailableError` if nothing new is begun any more."""
        if self.draining.is_set():
            raise UnavailableError("the gateway is shutting down", "draining")

    def check_model(self, name: str) -> None:
        """Raises `InvalidRequestError` (404) for a model that is not served here."""
        if name != self.model_name:
            raise InvalidRequestError(
                f"the model {name[:200]!r} does not exist",
                status=404,
                param="model",
                code="model_not_found",
            )


def gateway_of(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


async def authorized(request: Request) -> None:
    """Dependency of routes that need a key. Raises `InvalidRequestError` (401)."""
    request.state.grant = gateway_of(request).keys.grant(request.headers.get("authorization"))


def grant_of(request: Request) -> Grant:
    """What an authorized request may ask for."""
    grant: Grant = request.state.grant
    return grant
