"""How long an iteration takes: the machine that a simulation pretends to have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Hardware:
    """Seconds of prefill: a + b * tokens + c * tokens^2; of decode: a + b * context + c * rows.

    A mixed iteration reads the weights once, so of the two constant terms the larger one counts,
    once; the others add up. A chunk from token s to token e of a prompt takes c * (e^2 - s^2), so
    that the chunks of a prompt add up to the whole.
    """

    name: str
    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    decode_large: tuple[float, float, float]  # from `large_batch` rows on
    large_batch: int
    kv_capacity_tokens: int | None
    kv_bytes_per_token: int

    def iteration_s(self, chunks: Sequence[tuple[int, int]], rows: int, context: int) -> float:
        """Seconds of an iteration.

        chunks: first and last token (exclusive) of every prefill chunk. rows, context: decode rows
        and the sum of the tokens that they attend to.
        """
        seconds = constant = 0.0
        if rows:
            large = rows >= self.large_batch
            constant, per_context, per_row = self.decode_large if large else self.decode
            seconds = per_context * context + per_row * rows
        if chunks:
            first, per_token, per_square = self.prefill
            constant = max(constant, first)
            for start, end in chunks:
                seconds += per_token * (end - start) + per_square * (end * end - start * start)
        return constant + seconds


def load_hardware(path: Path) -> Hardware:
    """From a file with the fields `prefill_ms`, `decode_ms`, `decode_large_ms` and `large_batch`
    (both optional), `kv_capacity_tokens` (optional) and `kv_bytes_per_token`.

    Raises ValueError with one sentence.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cost model {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"cost model {path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"cost model {path} must be a JSON object")
    decode = _terms(path, found, "decode_ms")
    large = _terms(path, found, "decode_large_ms") if "decode_large_ms" in found else decode
    capacity = found.get("kv_capacity_tokens")
    return Hardware(
        name=str(found.get("model", path.stem)),
        prefill=_terms(path, found, "prefill_ms"),
        decode=decode,
        decode_large=large,
        large_batch=_count(path, found, "large_batch") if "large_batch" in found else 1 << 30,
        kv_capacity_tokens=None if capacity is None else _count(path, found, "kv_capacity_tokens"),
        kv_bytes_per_token=_count(path, found, "kv_bytes_per_token"),
    )


def _terms(path: Path, found: dict[str, Any], name: str) -> tuple[float, float, float]:
    """Three numbers in milliseconds, as seconds."""
    value = found.get(name)
    numbers = isinstance(value, list) and all(
        isinstance(term, int | float) and not isinstance(term, bool) and term >= 0 for term in value
    )
    if not isinstance(value, list) or not numbers or len(value) != 3 or not value[0] > 0:
        raise ValueError(
            f"cost model {path}: {name} must be three numbers >= 0, the first greater than 0"
        )
    return value[0] / 1e3, value[1] / 1e3, value[2] / 1e3


def _count(path: Path, found: dict[str, Any], name: str) -> int:
    value = found.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"cost model {path}: {name} must be a whole number of at least 1")
    return value


# OPT-13B on one A100-80GB, fitted by the DistServe authors (simdistserve profiles, Apache-2.0).
OPT_13B = Hardware(
    name="OPT-13B, tensor parallel 1, one A100-SXM-80GB",
    prefill=(0.01810254646487362, 0.0001019122572698738, 7.122264314252114e-09),
    decode=(0.019934702624895458, 6.269356524350583e-07, 3.850697740828398e-05),
    decode_large=(0.0071661889468253595, 5.798000403396046e-07, 0.00015831096191764046),
    large_batch=95,
    kv_capacity_tokens=66144,
    kv_bytes_per_token=819200,
)
