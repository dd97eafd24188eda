from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer

from fastserve.gateway.scheduler_client import SchedulerClient
from unit.gateway.scripted_scheduler import ScriptedScheduler, running_client, running_scheduler


@pytest.fixture(scope="session")
def reference_tokenizer(default_model_folder: Path) -> FastTokenizer:
    """The default model's tokenizer as the library itself encodes and decodes."""
    return FastTokenizer.from_file(str(default_model_folder / "tokenizer.json"))


@pytest.fixture
async def scheduler() -> AsyncIterator[ScriptedScheduler]:
    async with running_scheduler() as running:
        yield running


@pytest.fixture
async def client(scheduler: ScriptedScheduler) -> AsyncIterator[SchedulerClient]:
    async with running_client(scheduler.address) as running:
        yield running
