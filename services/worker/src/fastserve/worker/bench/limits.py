"""What this machine can do: the speeds that no engine exceeds.

Measured with PyTorch's own kernels in the same run as the engine: both see the same machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_READ_BYTES = 256 << 20
_SIDE = 2048
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Limits:
    """read: bytes per second from memory. operations: multiplications and additions per second in
    a product of two matrices of 2048 x 2048, in the format of the weights; attention: the same in
    the format of the KV cache."""

    read: float
    operations: float
    attention: float


def measure_limits(
    weights: str, kv: str, seconds: float, clock: Clock = time.perf_counter
) -> Limits:
    """weights, kv: "float32", "bfloat16" or (weights only) "int8". The best of what fits in
    `seconds`, at least 3."""
    data = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    read = _READ_BYTES / best(data.sum, seconds / 2, clock)
    operations = _operations(weights, seconds / 2, clock)
    attention = operations if kv == weights else _operations(kv, seconds / 2, clock)
    return Limits(read, operations, attention)


def _operations(numbers: str, seconds: float, clock: Clock) -> float:
    ones = torch.ones(_SIDE, _SIDE, dtype=getattr(torch, numbers))
    product = torch._int_mm if numbers == "int8" else torch.mm
    return 2 * _SIDE**3 / best(lambda: product(ones, ones), seconds, clock)


def best(action: Callable[[], object], seconds: float, clock: Clock = time.perf_counter) -> float:
    """Shortest duration of `action` by `clock` in `seconds` of trying, at least 3 times."""
    found, times, started = float("inf"), 0, clock()
    while times < 3 or clock() - started < seconds:
        begun = clock()
        action()
        found = min(found, clock() - begun)
        times += 1
    return found
