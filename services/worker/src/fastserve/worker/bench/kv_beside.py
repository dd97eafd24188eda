"""What copies of KV blocks do to the iterations that run beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

from fastserve.worker.model.batch import Batch
from fastserve.worker.model.choose import AnyModel
from fastserve.worker.model.kv_cache import KvCache

BLOCK = 16  # tokens
ROWS = 8
CONTEXT = 256
_GROUP = 8  # iterations that are timed together
_WARM = 16


@dataclass(frozen=True, slots=True)
class Slowdown:
    """By how much copies make iterations longer: 0.01 is one percent. `low` to `high`: 95 % of
    repetitions would have their median there."""

    name: str
    share: float
    low: float
    high: float


class Decodes:
    """Decode iterations of the model itself, on all its threads, over the first blocks of `kv`."""

    def __init__(self, model: AnyModel, kv: KvCache) -> None:
        each = -(-CONTEXT // BLOCK)
        self.blocks = ROWS * each  # of `kv`, that are used
        self._model, self._kv = model, kv
        self._batch = Batch(
            token_ids=list(range(ROWS)),
            query_lens=[1] * ROWS,
            context_lens=[CONTEXT] * ROWS,
            block_tables=[list(range(row * each, (row + 1) * each)) for row in range(ROWS)],
            logit_rows=list(range(ROWS)),
        )

    def group(self, before: Callable[[int], object]) -> float:
        """Seconds of some iterations; `before` is called with the number of each."""
        begun = time.perf_counter()
        for number in range(_GROUP):
            before(number)
            self._model.forward(self._batch, self._kv)
        return time.perf_counter() - begun


def slowdowns(
    decodes: Decodes, copy: Callable[[int], object], rounds: int
) -> tuple[float, list[Slowdown]]:
    """Median seconds of an iteration alone, and what copies beside it do. `copy(n)` copies a block.

    Compared with groups of iterations just before, in turn, so that what slows the machine slows
    both: nothing (the noise of the measurement itself); half a block per iteration, which is what
    8 rows fill and all that can be written through while they decode; copies without a pause.
    """
    stop = Event()

    def nothing(number: int) -> None:
        pass

    def endless() -> None:
        number = 0
        while not stop.is_set():
            copy(number := number + 1)

    alone: list[float] = []
    found: dict[str, list[tuple[float, float]]] = {}
    with ThreadPoolExecutor(1) as thread:

        def half_a_block(number: int) -> None:
            if number % 2:
                thread.submit(copy, number)

        def unpaced(number: int) -> None:
            if not number:
                stop.clear()
                thread.submit(endless)

        kinds = {"no copies": nothing, "half a block each": half_a_block, "no pause": unpaced}
        for _ in range(_WARM):
            decodes.group(half_a_block)
        for _ in range(rounds):
            for name, before in kinds.items():
                base = decodes.group(nothing)
                with_copies = decodes.group(before)
                stop.set()
                thread.submit(nothing, 0).result()  # copies under way have ended
                alone.append(base)
                found.setdefault(name, []).append((base, with_copies))
    each = statistics.median(alone) / _GROUP
    return each, [_slowdown(name, pairs) for name, pairs in found.items()]


def _slowdown(name: str, pairs: Sequence[tuple[float, float]]) -> Slowdown:
    ratios = sorted(other / base - 1 for base, other in pairs)
    # So many of n values are below their true median in 95 of 100 cases: n/2 +- sqrt(n).
    reach = len(ratios) ** 0.5
    low = max(0, int(len(ratios) / 2 - reach))
    high = min(len(ratios) - 1, int(len(ratios) / 2 + reach))
    return Slowdown(name, statistics.median(ratios), ratios[low], ratios[high])
