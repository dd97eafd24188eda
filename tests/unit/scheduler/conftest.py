from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from fastserve.scheduler.store import Store
from support.valkey import Valkey, running_valkey


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[Valkey]:
    with running_valkey() as server:
        yield server


@pytest.fixture
async def redis(shared_valkey: Valkey) -> AsyncIterator[Redis]:
    """A plain client of an empty server."""
    async with Redis.from_url(shared_valkey.url, decode_responses=True) as client:
        await client.flushall()
        yield client


@pytest.fixture
async def store(redis: Redis, shared_valkey: Valkey) -> AsyncIterator[Store]:
    store = Store(shared_valkey.url, "s", timeout_s=2.0)
    yield store
    await store.close()
