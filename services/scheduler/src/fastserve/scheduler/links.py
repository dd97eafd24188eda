"""The links to all worker groups, which come and go as they are discovered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial

import structlog

from fastserve.scheduler.discovery import Discovery, Endpoint
from fastserve.scheduler.worker_link import WorkerLink

log = structlog.get_logger(__name__)


class Links:
    """One link per address. One that is not known any more ends with its stream: a worker that
    drains is not to be found any more, and has jobs still."""

    def __init__(self, discovery: Discovery, make: Callable[[Endpoint], WorkerLink]) -> None:
        self._discovery, self._make = discovery, make
        self._links: dict[str, WorkerLink] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def __iter__(self) -> Iterator[WorkerLink]:
        return iter(list(self._links.values()))

    async def run(self) -> None:
        """Until cancelled. Raises what a link raises."""
        async with asyncio.TaskGroup() as group:
            async for endpoints in self._discovery.watch():
                self._follow(endpoints, group)

    def _follow(self, endpoints: frozenset[Endpoint], group: asyncio.TaskGroup) -> None:
        wanted = {endpoint.address for endpoint in endpoints}
        for address, link in list(self._links.items()):
            link.wanted = address in wanted
            if not link.wanted and link.described is None:
                self._tasks[address].cancel()
        for endpoint in sorted(endpoints):
            if endpoint.address in self._links:
                continue
            link = self._make(endpoint)
            self._links[endpoint.address] = link
            task = group.create_task(link.run())
            self._tasks[endpoint.address] = task
            task.add_done_callback(partial(self._forget, endpoint.address))
        log.info("worker groups", addresses=sorted(wanted))

    def _forget(self, address: str, _: asyncio.Task[None]) -> None:
        del self._links[address], self._tasks[address]
