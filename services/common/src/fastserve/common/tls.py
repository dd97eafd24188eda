"""Mutual TLS between services: one certificate per service, all signed by one authority.

Settings name PEM files. Unix sockets stay plain: the file system says who may open them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc
from pydantic import Field, model_validator

from fastserve.common.errors import StartupError
from fastserve.common.settings import ServiceSettings


class TlsSettings(ServiceSettings):
    """Of a service that calls others or is called by them."""

    tls_cert: Path | None = Field(
        default=None, description="certificate for calls between services (PEM; default: plain)"
    )
    tls_key: Path | None = Field(default=None, description="its private key (PEM)")
    tls_ca: Path | None = Field(
        default=None, description="authority that signed the certificates of all services (PEM)"
    )
    tls_server_name: str = Field(
        default="", description="name in the certificates of those called (default: the host)"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        given = (self.tls_cert, self.tls_key, self.tls_ca)
        if any(given) and not all(given):
            raise ValueError("--tls-cert, --tls-key and --tls-ca go together")
        return self


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM texts: our certificate and key, and the authority that all others' are signed by."""

    cert: bytes
    key: bytes
    ca: bytes
    server_name: str

    def server(self) -> grpc.ServerCredentials:
        """Accept only callers with a certificate of the authority."""
        return grpc.ssl_server_credentials([(self.key, self.cert)], self.ca, True)

    def client(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)


def load_tls(settings: TlsSettings) -> Tls | None:
    """Read the files named in the settings; None if there are none. Raises `StartupError`."""
    if not (settings.tls_cert and settings.tls_key and settings.tls_ca):
        return None
    cert, key, ca = map(read_secret, (settings.tls_cert, settings.tls_key, settings.tls_ca))
    return Tls(cert, key, ca, settings.tls_server_name)


def read_secret(path: Path) -> bytes:
    """Content of a file that a setting names. Raises `StartupError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from error
