"""Settings of the gateway."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from pydantic import Field, SecretStr, field_validator

from fastserve.common.errors import StartupError
from fastserve.common.tls import TlsSettings
from fastserve.gateway.answer_ids import SHARD
from fastserve.gateway.auth import ApiKey, parse_key

_SCHEDULER: Final = re.compile(rf"(?:({SHARD})=)?(.+)")
_DEFAULT_SHARD: Final = "0"  # that of a scheduler without --shard


class GatewaySettings(TlsSettings):
    """The OpenAI-compatible HTTP gateway."""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on (0: any free)")
    root_path: str = Field(
        default="", description="path prefix under which a proxy shows this server"
    )
    scheduler: list[str] = Field(
        default=["127.0.0.1:7070"],
        min_length=1,
        description="gRPC address of a scheduler, [SHARD=]ADDRESS; repeat for standbys and shards "
        "(without a name: shard 0)",
    )
    model: Path = Field(description="folder with tokenizer.json and the chat template")
    served_model_name: str = Field(
        default="", description="name of the model in requests (default: what the workers report)"
    )
    api_key: list[SecretStr] = Field(
        default=[], description="key that requests must carry; repeat for more (default: none)"
    )
    api_key_file: Path | None = Field(
        default=None,
        description="file with more keys, one a line, each with what it grants if that is limited: "
        "KEY tenant=NAME class=interactive|default|batch weight=NUMBER; # begins a comment",
    )
    max_body_size: int = Field(
        default=4 * 1024 * 1024, ge=1, description="bytes a request body may have"
    )
    max_n: int = Field(default=16, ge=1, description="largest n of a request")
    max_prompts: int = Field(
        default=64, ge=1, description="prompts one completions request may carry"
    )
    ping_interval: float = Field(
        default=10.0, gt=0, description="seconds of silence after which a stream gets a comment"
    )
    send_timeout: float = Field(
        default=60.0, gt=0, description="seconds a client may stop reading before it is cut off"
    )
    scheduler_timeout: float = Field(
        default=5.0,
        ge=0,
        description="seconds a new request waits for the scheduler's answer, then 503",
    )
    reattach_timeout: float = Field(
        default=30.0,
        ge=0,
        description="seconds running requests wait for a scheduler that went away",
    )

    @field_validator("scheduler")
    @classmethod
    def _addresses(cls, addresses: list[str]) -> list[str]:
        if not all(_SCHEDULER.fullmatch(address) for address in addresses):
            raise ValueError("an address is empty")
        return addresses

    @field_validator("api_key")
    @classmethod
    def _no_empty_key(cls, keys: list[SecretStr]) -> list[SecretStr]:
        if any(not key.get_secret_value().strip() for key in keys):
            raise ValueError("a key is empty")
        return keys

    @property
    def model_name(self) -> str:
        """Name of the model in requests and answers."""
        return self.served_model_name or self.model.resolve().name

    def addresses(self) -> dict[str, list[str]]:
        """Addresses of schedulers by shard."""
        shards: dict[str, list[str]] = {}
        for setting in self.scheduler:
            match = _SCHEDULER.fullmatch(setting)
            assert match is not None
            shards.setdefault(match[1] or _DEFAULT_SHARD, []).append(match[2])
        return shards

    def keys(self) -> list[ApiKey]:
        """All API keys; none: no key is asked for. Raises `StartupError`."""
        keys = [ApiKey(key.get_secret_value()) for key in self.api_key]
        if self.api_key_file is None:
            return keys
        try:
            lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"key file {self.api_key_file} cannot be read: {error}") from error
        found: dict[str, ApiKey] = {}
        for number, line in enumerate(lines, 1):
            try:
                key = parse_key(line)
                if key is not None and found.setdefault(key.key, key) != key:
                    raise ValueError("the key was given before, with other properties")
            except ValueError as error:
                raise StartupError(
                    f"key file {self.api_key_file}, line {number}: {error}"
                ) from None
        if not found:
            raise StartupError(f"key file {self.api_key_file} holds no key")
        return keys + list(found.values())
