"""Settings of the sidecar."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from fastserve.common.settings import ServiceSettings

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "512M", "4G", "4GiB" or a plain number (powers of 1024).

    Raises ValueError for anything else, zero included.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(match[1]) * _UNITS[match[2].upper()] if match else 0
    if size <= 0:
        raise ValueError(f"{text!r} is not a size such as 512M or 4G")
    return size


class Settings(ServiceSettings):
    """FastServe kv-offload: host memory for the KV cache blocks of preempted jobs."""

    listen: str = Field(
        default="unix:/tmp/fastserve-kv-offload.sock",
        description="address of the gRPC service: unix:/path or host:port",
    )
    host_memory: str = Field(
        default="1G", description="size of the pool, such as 512M or 4G (unless --host-blocks)"
    )
    host_blocks: int | None = Field(
        default=None, ge=1, description="size of the pool in KV blocks instead of bytes"
    )
    pool_dir: Path = Field(
        default=Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir()),
        description="folder of the pool file; the worker maps the same file",
    )

    @field_validator("host_memory")
    @classmethod
    def _size(cls, value: str) -> str:
        parse_size(value)
        return value

    @model_validator(mode="after")
    def _folder(self) -> Settings:
        if not self.pool_dir.is_dir():
            raise ValueError(f"pool folder {self.pool_dir} does not exist")
        return self
