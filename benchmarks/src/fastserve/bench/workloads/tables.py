"""Lengths drawn from quantile tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray

Lengths = tuple[NDArray[np.int64], NDArray[np.int64]]  # prompt tokens, output tokens


@dataclass(frozen=True, slots=True)
class Table:
    """Quantiles of a trace of `jobs` jobs, in tokens.

    `prompts` holds the prompt lengths at `prompt_quantiles`; `outputs`, for each of some bands of
    prompt lengths with equal numbers of jobs, shortest first, the output lengths at
    `output_quantiles`.
    """

    jobs: int
    prompt_quantiles: tuple[float, ...]
    output_quantiles: tuple[float, ...]
    prompts: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]


def draw(table: Table, jobs: int, rng: np.random.Generator) -> Lengths:
    """Lengths of `jobs` jobs; the output length depends on the band of the prompt length."""
    at = rng.random(jobs)
    prompts = np.interp(at, table.prompt_quantiles, table.prompts)
    bands = (at * len(table.outputs)).astype(np.intp)
    at = rng.random(jobs)
    outputs = np.empty(jobs)
    for band, values in enumerate(table.outputs):
        here = bands == band
        outputs[here] = np.interp(at[here], table.output_quantiles, values)
    return np.rint(prompts).astype(np.int64), np.rint(outputs).astype(np.int64)


@cache
def tables() -> dict[str, Table]:
    """The tables that come with the package, by the name of their workload."""
    text = resources.files(__package__).joinpath("tables.json").read_text(encoding="utf-8")
    return {
        name: Table(
            jobs=entry["jobs"],
            prompt_quantiles=tuple(entry["prompt_quantiles"]),
            output_quantiles=tuple(entry["output_quantiles"]),
            prompts=tuple(entry["prompts"]),
            outputs=tuple(tuple(band) for band in entry["outputs"]),
        )
        for name, entry in json.loads(text).items()
    }
