"""What several commands ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastserve.cli.state import StateFolder, default_folder

StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        help="Folder for state and logs; one deployment each (default: ~/.local/state/fastserve).",
        show_default=False,
    ),
]
_TLS = "Mutual TLS, as of the services"
TlsCert = Annotated[
    Path | None,
    typer.Option(help="Certificate (PEM; or FASTSERVE_TLS_CERT).", rich_help_panel=_TLS),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(help="Its private key (PEM; or FASTSERVE_TLS_KEY).", rich_help_panel=_TLS),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(help="Authority of all (PEM; or FASTSERVE_TLS_CA).", rich_help_panel=_TLS),
]
TlsServerName = Annotated[
    str | None,
    typer.Option(
        help="Name in their certificates (or FASTSERVE_TLS_SERVER_NAME; default: the host).",
        rich_help_panel=_TLS,
    ),
]


def folder(state_dir: Path | None) -> StateFolder:
    return StateFolder(state_dir or default_folder())
