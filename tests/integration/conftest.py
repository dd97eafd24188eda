"""What most of these tests talk to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from support.fake_worker import FakeWorker
from support.valkey import Valkey, running_valkey


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with running_valkey() as server:
        yield server


@pytest.fixture
async def worker() -> AsyncIterator[FakeWorker]:
    worker = FakeWorker(device_blocks=512)
    async with worker.serving():
        yield worker
    assert worker.violations == []
