"""Latency over rate, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fastserve.bench.sweep import Report, curves

_PANELS: Final = {"mean": "Mean", "p95": "P95", "p99": "P99"}
# Okabe and Ito's colours, which people of all kinds of colour vision can tell apart.
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")


def plot(
    reports: Sequence[Report], folder: Path, *, title: str, slo: float | None = None
) -> list[Path]:
    """Mean, P95 and P99 per-token latency over the rate, a line per policy.

    Each point is the mean over the seeds, the band around it a 95 % interval (see `estimate`; none
    for one seed). `slo` in seconds per token is drawn across. Writes latency.png and latency.svg
    into `folder`, the same bytes for the same reports.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    all_axes = figure.subplots(1, len(_PANELS), sharey=True)
    for axes, (statistic, words) in zip(all_axes, _PANELS.items(), strict=True):
        lines = curves(reports, "per_token_s", statistic)
        for number, (policy, curve) in enumerate(lines.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            marker = _MARKERS[number % len(_MARKERS)]
            rates = list(curve)
            points = list(curve.values())
            means = [point.mean for point in points]
            axes.plot(rates, means, color=colour, marker=marker, markersize=4, label=policy)
            axes.fill_between(
                rates,
                [point.low for point in points],
                [point.high for point in points],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
        if slo is not None:
            axes.axhline(slo, color="0.35", linestyle="--", linewidth=1, label=f"SLO {slo:g} s")
        axes.set_yscale("log")
        axes.set_title(words)
        axes.set_xlabel("job/s")
        axes.grid(True, which="major", alpha=0.3)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    all_axes[0].set_ylabel("per-token latency (s)")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
    figure.suptitle(title, fontsize="medium")
    paths = [folder / "latency.png", folder / "latency.svg"]
    # Ids and dates in the SVG would make every file new.
    with matplotlib.rc_context({"svg.hashsalt": "fastserve"}):
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
