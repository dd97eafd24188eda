"""How long a prefill and a decode take here: first samples for the scheduler's cost model."""

from __future__ import annotations

import time

from fastserve.proto.v1 import worker_pb2
from fastserve.worker.engine import ForwardModel
from fastserve.worker.model.batch import Batch
from fastserve.worker.model.kv_cache import KvCache

_PREFILL = 128


def measure(
    model: ForwardModel, kv: KvCache, max_tokens: int
) -> tuple[worker_pb2.CostSample, worker_pb2.CostSample]:
    """(prefill, decode), the better of two runs each. The KV cache must not be in use yet."""
    length = min(_PREFILL, max_tokens, kv.num_blocks * kv.block_size - 1)
    table = list(range(-(-(length + 1) // kv.block_size)))
    prefill = Batch([0] * length, [length], [length], [table], [0])
    decode = Batch([0], [1], [length + 1], [table], [0])
    return _time(model, kv, prefill), _time(model, kv, decode)


def _time(model: ForwardModel, kv: KvCache, batch: Batch) -> worker_pb2.CostSample:
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        model.forward(batch, kv).sum().item()  # .item(): wait for the device
        seconds.append(time.perf_counter() - start)
    return worker_pb2.CostSample(
        rows=len(batch.query_lens),
        new_tokens=len(batch.token_ids),
        context_tokens=sum(batch.context_lens),
        seconds=min(seconds),
    )
