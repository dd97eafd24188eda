"""The figures of a benchmark as a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastserve.bench.load.report import Report
from fastserve.bench.output import write_rows


def write_csv(path: Path, reports: Sequence[Report]) -> None:
    """One row per run; `ttft_s_p95` and the like in seconds."""
    write_rows(path, [_flat(found) for found in reports])


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
