"""Settings of the sidecar."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from fastserve.common.rpc import RpcSettings

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_ALL_INTERFACES = ("0.0.0.0", "[::]")
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


class Settings(RpcSettings):
    """FastServe kv-offload: host memory and disk for the KV cache blocks of preempted jobs."""

    listen: str = Field(
        default="unix:/tmp/fastserve-kv-offload.sock",
        description="address of the gRPC service: unix:/path or host:port",
    )
    host_memory: str = Field(
        default="1G", description="size of the pool, such as 512M or 4G (unless --host-blocks)"
    )
    host_blocks: int | None = Field(
        default=None, ge=1, description="size of a worker's pool in KV blocks instead of bytes"
    )
    pool_dir: Path = Field(
        default=Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir()),
        description="folder of the pool file; the worker maps the same file",
    )
    verify: bool = Field(
        default=True, description="workers check the checksum of what they read from host memory"
    )
    workers: int = Field(
        default=1, ge=1, description="workers that share this sidecar, in equal parts"
    )
    owner_lease: float = Field(
        default=600.0, gt=0, description="seconds after which the blocks of a lost worker are freed"
    )
    disk_path: Path | None = Field(
        default=None, description="folder for blocks that do not fit into host memory"
    )
    disk_size: str | None = Field(
        default=None, description="how much of it to use, such as 100G (needed with --disk-path)"
    )
    peer_listen: str = Field(
        default="", description="host:port for sidecars of other pods (default: none)"
    )
    peer_address: str = Field(
        default="", description="host:port at which they reach it (default: that of --peer-listen)"
    )
    peer_token_file: Path | None = Field(
        default=None, description="file with the secret that sidecars share"
    )

    @field_validator("host_memory", "disk_size")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if not self.pool_dir.is_dir():
            raise ValueError(f"pool folder {self.pool_dir} does not exist")
        if (self.disk_path is None) != (self.disk_size is None):
            raise ValueError("--disk-path and --disk-size go together")
        if self.disk_path is not None and not self.disk_path.is_dir():
            raise ValueError(f"disk folder {self.disk_path} does not exist")
        if self.peer_listen and not (self.peer_token_file or self.tls_cert):
            raise ValueError("--peer-listen needs --peer-token-file or --tls-cert, -key and -ca")
        host = self.peer_listen.rpartition(":")[0]
        if host in _ALL_INTERFACES and not self.peer_address:
            raise ValueError(f"--peer-listen on {host} needs --peer-address: the host to call")
        return self
