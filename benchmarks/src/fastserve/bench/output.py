"""How a command ends, and what it leaves in the folder of --out but for the plots."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer


def end(message: str, status: int) -> NoReturn:
    """One sentence on stderr, and this exit status."""
    typer.secho(message, err=True, fg="red")
    raise typer.Exit(status)


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
