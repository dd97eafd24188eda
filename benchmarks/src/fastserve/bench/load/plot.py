"""Latency and throughput over the load, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fastserve.bench.load.report import Report

_STYLES: Final = {"p50": ("o", "-"), "p99": ("D", ":")}
# Okabe and Ito's colours, which people of all kinds of colour vision can tell apart.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LATENCIES: Final = {"ttft_s": "time to first token (s)", "tpot_s": "time per output token (s)"}


def plot(
    curves: Mapping[str, Sequence[Report]], folder: Path, *, title: str, name: str = "load"
) -> list[Path]:
    """Latencies and throughput over the rate or the number of clients, a colour per curve.

    Writes NAME.png and NAME.svg into `folder`, the same bytes for the same reports.
    """
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    all_axes = figure.subplots(1, 3)
    closed = next(iter(curves.values()))[0]["concurrency"] is not None
    for axes, (metric, words) in zip(all_axes, _LATENCIES.items(), strict=False):
        anything = False
        for colour, (curve, reports) in zip(_cycle(len(curves)), curves.items(), strict=True):
            for statistic in ("p50", "p99"):
                marker, line = _STYLES[statistic]
                # A logarithm has no place for 0, which all tokens in one piece give.
                points = [(x, y) for x, y in _points(reports, metric, statistic) if y > 0]
                anything = anything or bool(points)
                label = f"{curve} {statistic.upper()}".strip()
                xs, ys = [x for x, _ in points], [y for _, y in points]
                axes.plot(xs, ys, color=colour, marker=marker, ls=line, ms=4, label=label)
        if anything:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(words)
    axes = all_axes[-1]
    for colour, (curve, reports) in zip(_cycle(len(curves)), curves.items(), strict=True):
        points = _points(reports, "output_tokens_per_s", None)
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, color=colour, marker="o", ms=4, label=curve)
    axes.set_ylabel("output tokens/s")
    axes.set_ylim(bottom=0)
    for axes in all_axes:
        _levels(axes, next(iter(curves.values())), closed=closed)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(title, fontsize="medium")
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    # Ids and dates in the SVG would make every file new.
    with matplotlib.rc_context({"svg.hashsalt": "fastserve"}):
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _cycle(count: int) -> list[str]:
    return [COLOURS[at % len(COLOURS)] for at in range(count)]


def _level(found: Report) -> float:
    if found["concurrency"] is not None:
        return float(found["concurrency"])
    return float(found["rate"] or 0.0)


def _points(
    reports: Sequence[Report], metric: str, statistic: str | None
) -> list[tuple[float, float]]:
    points = []
    for found in sorted(reports, key=_level):
        value = found[metric] if statistic is None else found[metric][statistic]
        if value is not None:
            points.append((_level(found), value))
    return points


def _levels(axes: Axes, reports: Sequence[Report], *, closed: bool) -> None:
    axes.set_xlabel("concurrent clients" if closed else "requests/s")
    if closed:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({_level(found) for found in reports}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(True, which="major", alpha=0.3)
