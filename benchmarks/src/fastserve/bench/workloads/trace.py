"""Trace files: one job a line, as CSV."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fastserve.bench.arrivals import LoadError

COLUMNS: Final = ("arrival_s", "prompt_tokens", "output_tokens")


class TraceError(LoadError):
    """A trace that cannot be used; the message is one sentence with the line."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Jobs as recorded, by arrival. `arrival_s` (seconds) is None where it was not asked for."""

    name: str
    arrival_s: NDArray[np.float64] | None
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.prompt_tokens)


def read_trace(path: Path, *, arrivals: bool) -> Trace:
    """Read a CSV file with a header and the columns arrival_s, prompt_tokens, output_tokens.

    Other columns are ignored. `arrivals`: whether arrival_s is wanted; if not, it is not looked
    at and may be missing. Raises `TraceError`.
    """
    wanted = COLUMNS if arrivals else COLUMNS[1:]
    moments: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in wanted if name not in header]
            if missing:
                raise TraceError(f"{path}, line 1: the column {missing[0]} is missing")
            places = [header.index(name) for name in COLUMNS[1:]]
            moment_at = header.index(COLUMNS[0]) if arrivals else -1
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    where = f"{path}, line {reader.line_num}"
                    raise TraceError(f"{where}: {len(row)} values under {len(header)} columns")
                try:
                    prompts.append(_tokens(row[places[0]], COLUMNS[1]))
                    outputs.append(_tokens(row[places[1]], COLUMNS[2]))
                    if arrivals:
                        moments.append(_seconds(row[moment_at]))
                except ValueError as error:
                    raise TraceError(f"{path}, line {reader.line_num}: {error}") from None
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TraceError(f"{path} is not a text file") from None
    except csv.Error as error:
        raise TraceError(f"{path}, line {reader.line_num}: {error}") from None
    if not prompts:
        raise TraceError(f"{path}, line 2: there is no job")
    prompt_tokens, output_tokens = np.array(prompts), np.array(outputs)
    if not arrivals:
        return Trace(path.name, None, prompt_tokens, output_tokens)
    arrival_s = np.array(moments)
    order = np.argsort(arrival_s, kind="stable")
    return Trace(path.name, arrival_s[order], prompt_tokens[order], output_tokens[order])


def _tokens(text: str, column: str) -> int:
    try:
        tokens = int(text)
    except ValueError:
        raise ValueError(f"{column} must be a whole number, not {text!r}") from None
    if not 1 <= tokens <= 1_000_000_000:
        raise ValueError(f"{column} must be from 1 to 1,000,000,000, not {tokens}")
    return tokens


def _seconds(text: str) -> float:
    if not text.strip():
        raise ValueError("arrival_s is empty, but the arrivals of the trace are asked for")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"arrival_s must be a number of seconds, 0 or more, not {text!r}")
    return seconds
