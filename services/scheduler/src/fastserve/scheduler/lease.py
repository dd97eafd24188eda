"""Who leads the shard: a lease in Redis with a fencing epoch that every write checks.

A leader that cannot reach Redis serves on from memory. If Redis is down, nobody can take its place.
When it returns, or has lost its data, whoever waits lets one lease time pass before it asks, so
that a leader with jobs in memory keeps the lease. If only the leader is cut off, its workers leave
it as soon as they hear the next leader's epoch.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from fastserve.scheduler.store import Held, Store
from fastserve.scheduler.store_errors import ADVICE, FencedError, StoreError, StoreLost, Trouble

if TYPE_CHECKING:
    from fastserve.scheduler.durability import Journal

log = structlog.get_logger(__name__)

_POLL_S: Final = 0.25
_RENEWALS: Final = 4  # in the time of a lease


@dataclass(frozen=True, slots=True)
class Term:
    """The time in which this process leads the shard."""

    epoch: int
    owner: str
    ttl_s: float


def owner_name() -> str:
    """Names this process for people who look into Redis."""
    return f"{socket.gethostname()}:{os.getpid()}"


async def win(store: Store, owner: str, ttl_s: float, answered: Callable[[], None]) -> Term:
    """Wait until this process leads. `answered` is called at every answer from Redis.

    Redis being away is waited for, with one line in the log per cause: services start in any
    order.
    """
    leader = ""
    seen = 0  # its epoch
    trouble: Trouble | None = None
    while True:
        try:
            if trouble is not None:
                await store.ping()
                await asyncio.sleep(ttl_s)
                seen = 0
            grant = await store.acquire(owner, ttl_s, seen)
        except StoreError as error:
            if error.trouble is not trouble:
                trouble = error.trouble
                log.error(
                    "redis does not serve: waiting for it",
                    kind=trouble,
                    reason=str(error),
                    advice=ADVICE[trouble],
                )
            await asyncio.sleep(_POLL_S)
            continue
        trouble = None
        answered()
        if not isinstance(grant, Held):
            log.info("leading", epoch=grant, owner=owner)
            return Term(grant, owner, ttl_s)
        seen = grant.epoch
        if grant.owner != leader:
            log.info("standby: another scheduler leads this shard", leader=grant.owner)
            leader = grant.owner
        await asyncio.sleep(_POLL_S)


async def keep(store: Store, term: Term, journal: Journal) -> None:
    """Renew until cancelled. Raises `FencedError` when another leader took over.

    Notices too when an idle Redis goes away or comes back without its data.
    """
    while True:
        await asyncio.sleep(term.ttl_s / _RENEWALS)
        losses, confirmed = journal.losses, journal.confirmed_seq
        try:
            seq = await store.renew(term.epoch, term.owner, term.ttl_s)
        except FencedError:
            raise
        except StoreError as error:
            journal.lose(error, losses)
            continue
        if seq < confirmed:
            journal.lose(StoreLost(f"redis holds write {seq} of {confirmed}"), losses)
