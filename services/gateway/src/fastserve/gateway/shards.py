"""The shards that serve the model: which one takes a new answer, and which one has an old one.

A shard is a leader with its standbys, worker groups and keys in Redis; shards know nothing of each
other. The id of an answer ends with the name of its shard, so every gateway finds it again without
asking anybody. All jobs of one answer are in one shard.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence

from fastserve.gateway.answer_ids import shard_of
from fastserve.gateway.scheduler_client import SchedulerClient


class Shards:
    """One client per shard; `run` keeps their streams up until it is cancelled."""

    def __init__(self, clients: Sequence[SchedulerClient]) -> None:
        self._clients = {client.shard: client for client in clients}

    def __iter__(self) -> Iterator[SchedulerClient]:
        return iter(self._clients.values())

    @property
    def connected(self) -> bool:
        """There is a stream to some shard."""
        return any(client.connected for client in self)

    @property
    def ready(self) -> bool:
        """Some shard has a worker."""
        return any(client.ready for client in self)

    @property
    def jobs(self) -> int:
        """Jobs that requests follow."""
        return sum(client.jobs for client in self)

    @property
    def model(self) -> str:
        """Name that the workers report, those of the first shard if they differ; "" so far none."""
        return next((client.model for client in self if client.model), "")

    @property
    def max_job_tokens(self) -> int:
        """Tokens that a job may have whichever shard gets it; 0 while no worker is known."""
        limits = [client.welcome.max_job_tokens for client in self if client.welcome is not None]
        return min((limit for limit in limits if limit), default=0)

    async def known(self) -> None:
        """Wait until some shard said Welcome once. Raises `SchedulerLostError`."""
        if any(client.welcome is not None for client in self):
            return
        waiting = [asyncio.ensure_future(client.limits()) for client in self]
        try:
            await next(asyncio.as_completed(waiting))
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def choose(self, jobs: int) -> SchedulerClient:
        """The shard for an answer of so many jobs: the one with the least load per row.

        Shards without a worker, or whose workers serve another model than those of the first one,
        come last. They all have the same chance if they are equal: gateways do not flock.
        """
        model = self.model

        def cost(client: SchedulerClient) -> tuple[bool, bool, float, float]:
            usable = client.ready and client.model == model
            return (not usable, not client.connected, client.load, random.random())

        best = min(self, key=cost)
        best.expect(jobs)
        return best

    def of(self, response_id: str) -> SchedulerClient | None:
        """The shard that has the answer; None if it is none of these."""
        return self._clients.get(shard_of(response_id) or "")

    async def run(self) -> None:
        """Keep the streams up until cancelled."""
        async with asyncio.TaskGroup() as group:
            for client in self:
                group.create_task(client.run())

    async def close(self) -> None:
        """Cancel all followed jobs; requests get `SchedulerLostError`."""
        await asyncio.gather(*(client.close() for client in self))
