"""Worker groups that are much slower than others: they get fewer jobs, and somebody should know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import structlog

from fastserve.scheduler.core import CostModel

log = structlog.get_logger(__name__)
# Times as long as another one; what is slow remains so until it is below the second. Groups may be
# of different sizes, so twice is no fault.
_SLOW: Final = 4.0
_AGAIN: Final = 3.0


class Slowness:
    """Compares the connected groups, and logs those that become slow once."""

    def __init__(self) -> None:
        self._slow: set[str] = set()

    def compare(self, models: Mapping[str, CostModel]) -> dict[str, float]:
        """How many times as long the decodes of each group take as those of the fastest that has
        at least as many rows: more rows take longer, so fewer must not."""
        ratios = {
            worker: max(
                own.decode_s / other.decode_s
                for other in models.values()
                if other.usual_rows >= own.usual_rows and other.decode_s > 0
            )
            for worker, own in models.items()
            if own.decode_s > 0
        }
        slow = {
            worker
            for worker, ratio in ratios.items()
            if ratio >= (_AGAIN if worker in self._slow else _SLOW)
        }
        for worker in slow - self._slow:
            times = round(ratios[worker], 1)
            log.warning("a worker is slow", worker=worker, times_as_long_as_others=times)
        for worker in (self._slow - slow) & ratios.keys():
            log.info("a worker is no longer slow", worker=worker)
        self._slow = slow
        return ratios
