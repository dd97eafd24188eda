"""Redis: jobs, levels, token logs and the leader's lease (key schema: lua/write.lua).

A write is one script call, so it happens whole or not at all. Writes of an epoch are numbered: one
that arrives late (its sender gave up waiting) is left out, and one that does not follow the last
that Redis holds tells that Redis has lost something.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, cast

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from fastserve.common.errors import StartupError
from fastserve.scheduler.store_errors import (
    ADVICE,
    FencedError,
    StoreError,
    StoreLost,
    StoreUnreachable,
    Trouble,
    store_error,
)
from fastserve.scheduler.stored import FIELDS, Batch, StoredJob, decode, encode

logger = structlog.get_logger(__name__)

LEVELS: Final = 64  # of the key schema; more than any policy uses
_SUPERSEDED: Final = -2  # renew in lease.lua
_LOAD_CHUNK: Final = 500  # jobs read in one round trip, a call of some 10 ms
_SLOW_S: Final = 0.05  # of a round trip; a hundred times what it should take
_SLOW_LOG_S: Final = 10.0  # between two lines about it


@dataclass(frozen=True, slots=True)
class Held:
    """The lease is another's."""

    epoch: int
    owner: str
    remaining_s: float


class Store:
    """One shard in Redis. Calls raise `StoreError`s only."""

    def __init__(
        self,
        url: str,
        shard: str,
        timeout_s: float,
        on_trouble: Callable[[Trouble], None] = lambda _: None,
    ) -> None:
        """`timeout_s` bounds every round trip; `on_trouble` counts those that failed or were slow.

        Raises `StartupError` for a malformed URL.
        """
        try:
            self._redis = Redis.from_url(
                url,
                # Time-outs are ours: those of the client cost a task per command, and before
                # Python 3.12 asyncio.wait_for, which they use, can lose a cancellation.
                socket_timeout=None,
                socket_connect_timeout=None,
                # A write that may have happened is never repeated blindly.
                retry=Retry(NoBackoff(), 0),
                decode_responses=True,
            )
        except ValueError as error:
            raise StartupError(f"redis URL: {error}") from error
        self._timeout_s = timeout_s
        self._on_trouble = on_trouble
        self._slow_told = float("-inf")
        self._base = f"fastserve:{{{shard}}}:"
        self._keys = [f"{self._base}epoch"]
        self._write = self._redis.register_script(_script("write"))
        self._read = self._redis.register_script(_script("read"))
        self._lease = self._redis.register_script(_script("lease"))

    async def close(self) -> None:
        await self._redis.aclose()

    async def ping(self) -> None:
        """Raises `StoreUnreachable` if there is no answer."""
        await self._ask(cast(Any, self._redis.ping()))

    async def evicts(self) -> bool:
        """Whether Redis may drop jobs to make room, instead of refusing writes."""
        info = await self._ask(cast(Any, self._redis.info("memory")))
        return bool(info.get("maxmemory")) and info.get("maxmemory_policy") != "noeviction"

    async def acquire(self, owner: str, ttl_s: float, seen: int = 0) -> int | Held:
        """Take the lease if it is free: the new epoch, else who holds it.

        Raises `StoreLost` if it is free because Redis has lost epoch `seen`.
        """
        epoch, left_ms, held = await self._run(
            self._lease, ["acquire", owner, _milliseconds(ttl_s), seen]
        )
        if epoch:
            return int(epoch)
        held_epoch, _, leader = held.partition(" ")
        return Held(int(held_epoch), leader, max(0, left_ms) / 1e3)

    async def renew(self, epoch: int, owner: str, ttl_s: float) -> int:
        """Keep the lease; the number of the last write that Redis holds, -1 if it forgot us.

        Raises `FencedError` if another leader came.
        """
        seq = await self._run(self._lease, ["renew", epoch, _milliseconds(ttl_s), owner])
        if seq == _SUPERSEDED:
            raise self._counted(FencedError(f"epoch {epoch} is over"))
        return int(seq)

    async def release(self, epoch: int) -> None:
        """Give the lease up, so that a standby need not wait for its end."""
        await self._run(self._lease, ["release", epoch])

    async def write(
        self, epoch: int, seq: int, batch: Batch, now_unix_s: float, keep_s: int, *, resync: bool
    ) -> None:
        """Write the changes of an iteration; `keep_s` is how long ended jobs stay.

        `seq` grows by one with every write of an epoch. `resync`: what Redis holds may be older
        than the write before this one. Raises `FencedError`, `StoreLost`, `StoreUnreachable`.
        """
        previous = -1 if resync else seq - 1
        head = [epoch, seq, previous, f"{now_unix_s:.3f}", keep_s]
        if not await self._run(self._write, [*head, *encode(batch)]):
            raise self._counted(StoreLost(f"write {seq} is older than what Redis holds"))

    async def job_ids(self) -> list[str]:
        """All jobs held, live ones first, in the order of their levels."""
        pipe = self._redis.pipeline(transaction=False)
        for level in range(LEVELS):
            pipe.zrange(f"{self._base}level:{level}", 0, -1)
        pipe.zrange(f"{self._base}finished", 0, -1)
        replies = await self._ask(pipe.execute())
        return [job_id for reply in replies for job_id in reply]

    async def load(self) -> list[StoredJob]:
        """Every job: live ones in the order of their levels, then ended ones."""
        ids = await self.job_ids()
        jobs: list[StoredJob] = []
        for start in range(0, len(ids), _LOAD_CHUNK):
            chunk = ids[start : start + _LOAD_CHUNK]
            replies = await self._run(self._read, [len(FIELDS), *FIELDS, *chunk])
            for job_id, (*values, log) in zip(chunk, replies, strict=True):
                if log is None or values[0] is None:
                    continue  # it expired meanwhile
                try:
                    jobs.append(decode(job_id, dict(zip(FIELDS, values, strict=True)), log))
                except (TypeError, ValueError) as error:
                    logger.error("job in redis is unreadable", job=job_id, reason=repr(error))
        return jobs

    async def _run(self, script: Any, args: Sequence[Any]) -> Any:
        return await self._ask(script(keys=self._keys, args=args))

    async def _ask(self, call: Awaitable[Any]) -> Any:
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await call
        except TimeoutError as error:
            late = StoreUnreachable(f"no answer within {self._timeout_s} s", Trouble.TIMEOUT)
            raise self._counted(late) from error
        except RedisError as error:
            raise self._counted(store_error(error)) from error
        took = time.monotonic() - started
        if took > _SLOW_S:
            self._slow(took)
        return reply

    def _counted(self, error: StoreError) -> StoreError:
        self._on_trouble(error.trouble)
        return error

    def _slow(self, took_s: float) -> None:
        """Count it, and say so from time to time."""
        self._on_trouble(Trouble.SLOW)
        now = time.monotonic()
        if now - self._slow_told > _SLOW_LOG_S:
            self._slow_told = now
            logger.warning("redis is slow", took_s=round(took_s, 3), advice=ADVICE[Trouble.SLOW])


def _script(name: str) -> str:
    return resources.files("fastserve.scheduler").joinpath(f"lua/{name}.lua").read_text()


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1e3))
