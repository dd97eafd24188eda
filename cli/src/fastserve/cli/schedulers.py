"""The schedulers that a command calls: where they are, and how they are reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import grpc

from fastserve.cli.errors import CliError
from fastserve.cli.state import StateFolder
from fastserve.common.errors import StartupError
from fastserve.common.settings import load_settings
from fastserve.common.tls import Tls, TlsSettings, load_tls


def addresses(given: Sequence[str], folder: StateFolder) -> list[str]:
    """Of the schedulers: as given, or those that run here. Raises `CliError`."""
    if given:
        return list(given)
    state = folder.read()
    if state is None:
        raise CliError(
            "FastServe does not run here: start it with `fastserve up`, or name its schedulers "
            "with --scheduler"
        )
    return [
        service["address"]
        for name, service in state["services"].items()
        if name.startswith("scheduler") and service.get("address")
    ]


def tls(
    cert: Path | None, key: Path | None, ca: Path | None, server_name: str | None
) -> Tls | None:
    """From flags, and for want of them from where services have it; None if nobody says anything.

    Raises `CliError` if something is missing or cannot be read.
    """
    given = {"cert": cert, "key": key, "ca": ca, "server-name": server_name}
    flags = [f"--tls-{name}={value}" for name, value in given.items() if value is not None]
    try:
        return load_tls(load_settings(TlsSettings, "fastserve", flags))
    except StartupError as error:
        raise CliError(str(error)) from error


def connect(address: str, tls: Tls | None) -> grpc.Channel:
    """A channel for blocking calls, to a Unix socket always plain."""
    # In-cluster names and Unix sockets: never through a proxy.
    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0)]
    if tls is None or address.startswith("unix:"):
        return grpc.insecure_channel(address, options)
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.secure_channel(address, tls.client(), options)
