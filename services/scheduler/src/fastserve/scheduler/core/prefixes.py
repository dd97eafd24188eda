"""Which beginnings of prompts the prefix cache of a worker group probably has: for placement.

A guess that costs a prefill when it is wrong. The worker alone knows, by keys that it tells nobody;
here it is remembered what was computed there, by plain hashes, and forgotten in the same order.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import islice
from typing import Final

from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.types import PrefixCache

# Jobs whose tokens are still to be looked at: nobody asks while there is only one group.
_PENDING: Final = 256
# Blocks of a job beyond these are not looked at.
_LONGEST: Final = 1024


class Prefixes:
    """Of one group. `blocks`: how many its caches hold."""

    def __init__(self, cache: PrefixCache, block_size: int, blocks: int) -> None:
        self._cache, self._block_size, self._blocks = cache, block_size, blocks
        self._pending: deque[Job] = deque(maxlen=_PENDING)
        self._known: OrderedDict[int, None] = OrderedDict()  # the oldest use first

    def note(self, job: Job) -> None:
        """What is known of the job has been computed here."""
        self._pending.append(job)

    def held(self, job: Job) -> int:
        """Tokens from its beginning on that are probably here, in full blocks."""
        while self._pending:
            noted = self._pending.popleft()
            self._remember(self._keys(noted, [*noted.spec.prompt, *noted.output]))
        if not self._known:
            return 0
        blocks = 0
        for key in self._keys(job, job.spec.prompt):
            if key not in self._known:
                break
            blocks += 1
        return blocks * self._block_size

    def _remember(self, keys: Sequence[int]) -> None:
        known = self._known
        for key in reversed(keys):  # the end of a chain is forgotten first
            known[key] = None
            known.move_to_end(key)
        while len(known) > self._blocks:
            known.popitem(last=False)

    def _keys(self, job: Job, tokens: Sequence[int]) -> list[int]:
        """Of its full blocks, each over those before it and the salt; none if it shares nothing."""
        salt, size = self._cache.salt(job.spec), self._block_size
        if not salt:
            return []
        keys, key = [], hash(salt)
        for end in islice(range(size, len(tokens) + 1, size), _LONGEST):
            key = hash((key, *tokens[end - size : end]))
            keys.append(key)
        return keys
