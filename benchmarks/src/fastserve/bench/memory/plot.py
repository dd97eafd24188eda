"""The strategies over the load, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fastserve.bench.load.plot import COLOURS
from fastserve.bench.load.report import Report
from fastserve.bench.memory.show import COLUMNS, mean, points

_PANELS: Final = {
    "per token": "per-token latency, mean (s)",
    "TTFT P99": "time to first token, P99 (s)",
    "wait": "waiting for KV over execution (%)",
}
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")


def plot(reports: Sequence[Report], folder: Path, *, title: str) -> list[Path]:
    """A panel per figure, a line per variant, the mean over the seeds.

    Writes memory.png and memory.svg into `folder`, the same bytes for the same reports.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    found = points(reports)
    loads = sorted({load for load, _ in found})
    names = list(dict.fromkeys(variant for _, variant in found))
    for axes, (column, words) in zip(
        figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True
    ):
        for at, name in enumerate(names):
            scale = 100.0 if column == "wait" else 1.0
            there = {load: mean(found.get((load, name), []), COLUMNS[column]) for load in loads}
            line = {load: value * scale for load, value in there.items() if value is not None}
            axes.plot(
                list(line), list(line.values()),
                color=COLOURS[at % len(COLOURS)], marker=_MARKERS[at % len(_MARKERS)], ms=5,
                label=name,
            )  # fmt: skip
        if column == "wait":
            axes.axhline(1.0, color="0.35", linestyle="--", linewidth=1)
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(words)
        axes.set_xlabel("load over capacity")
        axes.set_xticks(loads)
        axes.grid(True, which="major", alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(title, fontsize="medium")
    paths = [folder / "memory.png", folder / "memory.svg"]
    # Ids and dates in the SVG would make every file new.
    with matplotlib.rc_context({"svg.hashsalt": "fastserve"}):
        figure.savefig(paths[0], dpi=110)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
