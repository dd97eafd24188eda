"""The comparison for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from rich import box
from rich.table import Table

from fastserve.bench.load.report import Report
from fastserve.bench.report import seconds

# What is shown of the runs of a variant at a load: the mean over the seeds.
COLUMNS: Final[dict[str, Callable[[Report], float | None]]] = {
    "per token": lambda found: found["per_token_s"]["mean"],
    "P95": lambda found: found["per_token_s"]["p95"],
    "P99": lambda found: found["per_token_s"]["p99"],
    "e2e P99": lambda found: found["e2e_s"]["p99"],
    "TTFT": lambda found: found["ttft_s"]["mean"],
    "TTFT P99": lambda found: found["ttft_s"]["p99"],
    "tokens/s": lambda found: found["output_tokens_per_s"],
    "preempted": lambda found: found["preemptions"],
    "swapped": lambda found: found["preempted_swap"],
    "MB out": lambda found: found["bytes_out"] / 1e6,
    "MB in": lambda found: found["bytes_in"] / 1e6,
    "recomputed": lambda found: found["recomputed_tokens"],
    "wait": lambda found: found["kv_wait_share"],
}
_COUNTS: Final = {"tokens/s", "preempted", "swapped", "MB out", "MB in", "recomputed"}


def points(reports: Sequence[Report]) -> dict[tuple[float, str], list[Report]]:
    """The runs by load and variant, in the order in which they ran."""
    found: dict[tuple[float, str], list[Report]] = {}
    for one in reports:
        found.setdefault((one["load"], one["variant"]), []).append(one)
    return dict(sorted(found.items(), key=lambda item: item[0][0]))


def mean(runs: Sequence[Report], of: Callable[[Report], float | None]) -> float | None:
    """Over the runs; None if one has no value, or there is none."""
    values = [value for value in map(of, runs) if value is not None]
    return sum(values) / len(values) if values and len(values) == len(runs) else None


def table(reports: Sequence[Report], title: str) -> Table:
    """A block per load, a line per variant."""
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("load", no_wrap=True)
    shown.add_column("", no_wrap=True)
    for name in COLUMNS:
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("failed", justify="right")
    last = None
    for (load, variant), runs in points(reports).items():
        if last is not None and load != last:
            shown.add_section()
        last = load
        failed = sum(found["failed"] for found in runs)
        cells = [_cell(name, mean(runs, of)) for name, of in COLUMNS.items()]
        shown.add_row(f"{load:g}", variant, *cells, f"{failed:,}")
    return shown


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name == "wait":
        return f"{value:.2%}"
    return f"{value:,.0f}" if name in _COUNTS else seconds(value)
