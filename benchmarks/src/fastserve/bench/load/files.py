"""What a benchmark leaves in its folder, but for the plots."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastserve.bench.load.report import Report


def make_folder(folder: Path) -> None:
    """Raises ValueError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out: {folder} cannot be written to")


def write_csv(path: Path, reports: Sequence[Report]) -> None:
    """One row per run; `ttft_s_p95` and the like in seconds."""
    rows = [_flat(found) for found in reports]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _flat(found: Report) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in found.items():
        if name == "errors":
            row[name] = "; ".join(f"{count} x {error}" for error, count in value.items())
        elif isinstance(value, dict):
            row |= {f"{name}_{part}": inner for part, inner in value.items()}
        else:
            row[name] = value
    return row
