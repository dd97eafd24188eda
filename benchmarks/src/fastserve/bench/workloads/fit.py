"""Quantile tables of a trace.

    python -m fastserve.bench.workloads.fit NAME=TRACE.csv ...

prints the tables of these traces as JSON, in the shape of `tables.json` beside this file. With
--check it prints how well jobs drawn from the tables agree with each trace. The file here came from
(all of them public, lengths only):

    python -m fastserve.bench.workloads.fit sharegpt=sharegpt_first_turn.csv alpaca=alpaca.csv \
        azure-conv=azure2023_conv.csv azure-code=azure2023_code.csv > tables.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fastserve.bench.workloads.tables import Table, draw
from fastserve.bench.workloads.trace import Trace, TraceError, read_trace

# Prompt bands hold equal numbers of jobs. More of them keep more of how the output length hangs on
# the prompt length, and leave fewer jobs for the quantiles of each.
BANDS: Final = 16
PROMPT_QUANTILES: Final = tuple(
    np.concatenate([np.arange(0, 99) / 100, [0.99, 0.995, 0.999, 1.0]]).tolist()
)
OUTPUT_QUANTILES: Final = tuple(
    np.concatenate([[0, 0.01, 0.025], np.arange(5, 96, 5) / 100, [0.975, 0.99, 1.0]]).tolist()
)


def fit(trace: Trace) -> Table:
    """The quantiles of the prompt lengths, and those of the output lengths in each prompt band."""
    order = np.argsort(trace.prompt_tokens, kind="stable")
    outputs = trace.output_tokens[order]
    return Table(
        jobs=len(trace),
        prompt_quantiles=PROMPT_QUANTILES,
        output_quantiles=OUTPUT_QUANTILES,
        prompts=_quantiles(trace.prompt_tokens, PROMPT_QUANTILES),
        outputs=tuple(
            _quantiles(band, OUTPUT_QUANTILES) for band in np.array_split(outputs, BANDS)
        ),
    )


def _quantiles(values: NDArray[np.int64], at: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(int(value) for value in np.rint(np.quantile(values, at)))


def _agreement(name: str, trace: Trace, table: Table) -> str:
    prompts, outputs = draw(table, 200_000, np.random.default_rng(0))
    words = [
        f"{name}: correlation {_rank_correlation(trace.prompt_tokens, trace.output_tokens):.3f}"
        f" -> {_rank_correlation(prompts, outputs):.3f}"
    ]
    for what, real, drawn in (
        ("prompt", trace.prompt_tokens, prompts),
        ("output", trace.output_tokens, outputs),
    ):
        words.append(f"{what} mean {real.mean():.1f} -> {drawn.mean():.1f}")
        words += [
            f"P{q} {np.percentile(real, q):.0f} -> {np.percentile(drawn, q):.0f}"
            for q in (50, 95, 99)
        ]
    return ", ".join(words)


def _rank_correlation(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    ranks = [np.searchsorted(np.sort(x), x, side="left") for x in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def main(arguments: list[str]) -> int:
    """Exit status 2 for arguments or a trace that cannot be used."""
    check = "--check" in arguments
    pairs = [word.partition("=") for word in arguments if word != "--check"]
    if not pairs or not all(name and path for name, _, path in pairs):
        print("give NAME=TRACE.csv, once or more, and --check if wanted", file=sys.stderr)
        return 2
    tables = {}
    for name, _, path in pairs:
        try:
            trace = read_trace(Path(path), arrivals=False)
        except TraceError as error:
            print(error, file=sys.stderr)
            return 2
        tables[name] = fit(trace)
        if check:
            print(_agreement(name, trace, tables[name]))
    if not check:
        entries = [f"  {json.dumps(name)}: {_compact(table)}" for name, table in tables.items()]
        print("{\n" + ",\n".join(entries) + "\n}")
    return 0


def _compact(table: Table) -> str:
    """JSON with one list a line."""
    bands = ",\n      ".join(json.dumps(list(band)) for band in table.outputs)
    return (
        "{\n"
        f'    "jobs": {table.jobs},\n'
        f'    "prompt_quantiles": {json.dumps(list(table.prompt_quantiles))},\n'
        f'    "output_quantiles": {json.dumps(list(table.output_quantiles))},\n'
        f'    "prompts": {json.dumps(list(table.prompts))},\n'
        f'    "outputs": [\n      {bands}\n    ]\n'
        "  }"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
