"""Where the worker groups are: addresses that come and go.

A source yields the addresses that it knows, again whenever they change. What to do with one that is
gone is not its business: a worker that drains leaves DNS and the endpoints of its Service long
before its jobs are gone.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

import structlog

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """host:port or unix:/path of a worker group. pod: its name, where that is known."""

    address: str
    pod: str = ""


class Discovery(Protocol):
    """Finds worker groups."""

    def watch(self) -> AsyncIterator[frozenset[Endpoint]]:
        """All that are known now, then all of them again after each change. Never ends and never
        raises: what goes wrong is logged, and the last answer holds meanwhile."""


class Static:
    """A list, for good."""

    def __init__(self, addresses: list[str]) -> None:
        self._endpoints = frozenset(Endpoint(address) for address in addresses)

    async def watch(self) -> AsyncIterator[frozenset[Endpoint]]:
        yield self._endpoints
        await asyncio.Event().wait()


class Dns:
    """All addresses of names, such as that of a headless Service, looked up from time to time."""

    def __init__(self, names: list[str], interval_s: float) -> None:
        """names: each with a port."""
        self._names, self._interval_s = names, interval_s
        self._known: dict[str, frozenset[Endpoint]] = {}
        self._failing: set[str] = set()

    async def watch(self) -> AsyncIterator[frozenset[Endpoint]]:
        last: frozenset[Endpoint] | None = None
        while True:
            for name in self._names:
                await self._look_up(name)
            found = frozenset().union(*self._known.values())
            if found != last:
                yield found
                last = found
            await asyncio.sleep(self._interval_s)

    async def _look_up(self, name: str) -> None:
        """A name without an answer keeps those that it had: DNS fails more often than workers."""
        host, _, port = name.rpartition(":")
        try:
            infos = await asyncio.get_running_loop().getaddrinfo(
                host, int(port), type=socket.SOCK_STREAM
            )
        except OSError as error:
            if name not in self._failing:
                log.warning("a name of worker groups has no address", name=name, reason=str(error))
                self._failing.add(name)
            return
        self._failing.discard(name)
        self._known[name] = frozenset(Endpoint(join(*info[4][:2])) for info in infos)


def join(host: str | int, port: str | int) -> str:
    """host:port, with brackets where the host needs them."""
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
