"""The worker's service, without a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

from fastserve.proto.v1 import worker_pb2 as pb
from fastserve.worker.engine import Engine, Iteration
from fastserve.worker.engine_thread import EngineThread
from fastserve.worker.metrics import Metrics
from fastserve.worker.mover import StagingMover
from fastserve.worker.service import Worker
from support.waiting import eventually

ENGINE = SimpleNamespace(
    pool=SimpleNamespace(free=3),
    kv_ops=SimpleNamespace(copies=0),
    reset=lambda plan_id, host_tokens: {},
)


class _Thread:
    """Answers at once; nothing runs."""

    async def ask(self, question: Callable[[Any], Any]) -> Any:
        return question(ENGINE)

    def post(self, action: Callable[[Any], None]) -> None: ...


async def test_a_report_leaves_before_it_is_counted() -> None:
    order = list[str]()
    worker = Worker(
        pb.DescribeResponse(),
        cast(Engine, ENGINE),
        cast(EngineThread, _Thread()),
        cast(StagingMover, SimpleNamespace(staging=None, allow_exports=lambda allowed: None)),
        cast(Metrics, SimpleNamespace(observe=lambda iteration, free: order.append("counted"))),
    )

    async def requests() -> AsyncIterator[pb.RunRequest]:
        yield pb.RunRequest(plan=pb.Plan(plan_id=1, reset=True))
        await asyncio.Event().wait()

    async def scheduler() -> None:
        async for response in worker.Run(requests(), cast(Any, None)):
            order.append("inventory" if response.report.HasField("inventory") else "report")

    stream = asyncio.ensure_future(scheduler())
    await eventually(lambda: order == ["inventory"])
    worker.report(Iteration(1, 1))
    await eventually(lambda: len(order) == 3)
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    assert order == ["inventory", "report", "counted"]
