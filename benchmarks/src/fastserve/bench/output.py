"""What commands print, how they end, and what they leave in the folder of --out but for plots."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import typer
from rich.console import Console, RenderableType

_UNBOUNDED: Final = 10_000  # columns; a table takes what it needs


def end(message: str, status: int) -> NoReturn:
    """One sentence on stderr, and this exit status."""
    typer.secho(message, err=True, fg="red")
    raise typer.Exit(status)


def display(found: RenderableType) -> None:
    """To stdout: as wide as the terminal, or whole if that is a file or a pipe."""
    Console(width=None if sys.stdout.isatty() else _UNBOUNDED).print(found)


def make_folder(folder: Path) -> None:
    """Raises ValueError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out: {folder} cannot be written to")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file; the first row names the columns."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
