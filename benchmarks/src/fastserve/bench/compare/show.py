"""The comparison for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from fastserve.bench.load.report import Report
from fastserve.bench.report import seconds


def ratios(reports: Sequence[Report]) -> list[float | None]:
    """Tokens per second of the first contender over that of each, at the same level.

    None where the first has no run at that level, or the other got nothing done.
    """
    first = reports[0]["contender"] if reports else None
    base = {_level(found): found for found in reports if found["contender"] == first}
    found_ratios: list[float | None] = []
    for found in reports:
        other = base.get(_level(found))
        done = found["output_tokens_per_s"]
        found_ratios.append(
            other["output_tokens_per_s"] / done if other is not None and done else None
        )
    return found_ratios


def table(reports: Sequence[Report]) -> Table:
    """A block per level, contenders in the order in which they ran."""
    first = reports[0]
    shown = Table(
        title=f"{first['asked_prompt_tokens']} prompt tokens, "
        f"{first['asked_output_tokens']} new tokens, seed {first['seed']}; seconds",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for words in ("load", "server", "weights"):
        shown.add_column(words, no_wrap=True)
    for words in ("tokens/s", f"{first['contender']} is", "TTFT P50", "P99", "TPOT P50", "P99"):
        shown.add_column(words, justify="right", no_wrap=True)
    shown.add_column("failed", justify="right")
    rows = list(zip(reports, ratios(reports), strict=True))
    levels = list(dict.fromkeys(_level(found) for found in reports))
    for level in levels:
        for found, ratio in rows:
            if _level(found) != level:
                continue
            shown.add_row(
                _words(found),
                found["contender"],
                found["weights"],
                f"{found['output_tokens_per_s']:,.1f}",
                "-" if ratio is None else f"{ratio:.2f} x",
                *(seconds(found["ttft_s"][name]) for name in ("p50", "p99")),
                *(seconds(found["tpot_s"][name]) for name in ("p50", "p99")),
                f"{found['failed']:,}",
            )
        shown.add_section()
    return shown


def _level(found: Report) -> tuple[int | None, float | None]:
    return found["concurrency"], found["rate"]


def _words(found: Report) -> str:
    if found["concurrency"] is not None:
        return f"{found['concurrency']} at a time"
    return f"{found['rate']:g} requests/s"
