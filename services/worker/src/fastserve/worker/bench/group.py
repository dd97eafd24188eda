"""`python -m fastserve.worker.bench.group`: groups of ranks on this host beside a single process.

For every shape (tp x pp): the time of a decode step, how much of it each rank communicates (which
is mostly waiting for others), and the memory of each rank. All run PyTorch in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import Store, TCPStore
from torch.multiprocessing.spawn import spawn

from fastserve.worker.cores import usable_cores
from fastserve.worker.model.batch import Batch
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.files import DEFAULT_MODEL, prepare
from fastserve.worker.model.kv_cache import KvCache
from fastserve.worker.model.loader import load_model
from fastserve.worker.native.library import best_library
from fastserve.worker.parallel.comm import SharedMemory
from fastserve.worker.parallel.groups import Group
from fastserve.worker.parallel.model import GroupModel, Stage, follow
from fastserve.worker.parallel.shards import shard_of, split

_BLOCK = 16
_WARM = 3
_CPU = torch.device("cpu")


def _memory(field: str) -> float:
    """MiB of this process: VmRSS or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _batch(rows: int, context: int) -> Batch:
    """Greedy rows that decode at this context."""
    each = -(-context // _BLOCK)
    tables = [list(range(row * each, (row + 1) * each)) for row in range(rows)]
    ids = [100 + row for row in range(rows)]
    return Batch(ids, [1] * rows, [context] * rows, tables, list(range(rows)), [1] * rows)


def _rank(rank: int, shape: tuple[int, int], folder: Path, asked: Any, port: int) -> None:
    store = TCPStore("127.0.0.1", port, is_master=False)
    tp, pp = shape
    cores = usable_cores()
    torch.set_num_threads(max(1, cores // (tp * pp)))
    library = best_library()  # its memory is not the model's
    batch, before = _batch(asked.rows, asked.context), _memory("VmRSS")
    whole = ModelConfig.from_folder(folder)
    if tp * pp == 1:
        model = load_model(folder, torch.float32, _CPU)
        kv = _kv(model.config, batch)
        steps = _steps(lambda: model.forward(batch, kv), asked.steps)
        _tell(store, rank, {"steps": steps}, {}, before)
        return
    group = Group(rank, tp, pp, rank, True, "127.0.0.1", port)
    shard = shard_of(whole, group)
    model = load_model(folder, torch.float32, _CPU, shard=shard)
    kv = _kv(model.config, batch)
    ring = asked.rows * whole.hidden_size * 4
    stage = Stage(group, shard, model, SharedMemory(group, store, library, ring))
    if rank:
        follow(stage, kv)
        stage.seconds.clear()
        begun = time.perf_counter()
        follow(stage, kv)
        _tell(store, rank, {"wall": time.perf_counter() - begun}, stage.seconds, before)
        return
    leader = GroupModel(stage, whole, split(whole.vocab_size, tp))
    _steps(lambda: leader.forward(batch, kv), _WARM)
    leader.stop()
    total: defaultdict[str, float] = defaultdict(float)

    def add(seconds: Any) -> None:
        for kind, value in seconds.items():
            total[kind] += value

    leader.observe = add
    steps = _steps(lambda: leader.forward(batch, kv), asked.steps)
    leader.stop()
    _tell(store, rank, {"steps": steps, "wall": sum(steps)}, total, before)


def _kv(config: ModelConfig, batch: Batch) -> KvCache:
    return KvCache(config, sum(map(len, batch.block_tables)), _BLOCK, torch.float32, _CPU)


def _steps(step: Any, count: int) -> list[float]:
    """Seconds of each."""
    seconds = []
    with torch.inference_mode():
        for _ in range(count):
            begun = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begun)
    return seconds


def _tell(
    store: Store, rank: int, values: dict[str, Any], kinds: dict[str, float], before: float
) -> None:
    told = {**values, "kinds": kinds, "before": before, "peak": _memory("VmHWM")}
    store.set(f"told/{rank}", json.dumps(told))


def _measure(shape: tuple[int, int], folder: Path, asked: Any) -> None:
    """Run a shape in new processes and print what its ranks say."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    size = shape[0] * shape[1]
    arguments = (shape, folder, asked, store.port)
    spawn(_rank, arguments, nprocs=size)  # type: ignore[no-untyped-call]
    told = [json.loads(store.get(f"told/{rank}")) for rank in range(size)]
    steps = [seconds * 1e3 for seconds in told[0]["steps"][_WARM:]]
    print(
        f"tp {shape[0]} x pp {shape[1]}: {statistics.median(steps):.1f} ms per step of "
        f"{asked.rows} rows, {min(steps):.1f} at best"
    )
    for rank, said in enumerate(told):
        line = f"  rank {rank}: peak {said['peak']:.0f} MiB, {said['before']:.0f} without a model"
        if said["kinds"]:
            busy = 1 - sum(said["kinds"].values()) / said["wall"]
            times = ", ".join(
                f"{kind} {value / asked.steps * 1e3:.2f}" for kind, value in said["kinds"].items()
            )
            line += f"; computes {busy:.0%} of the time; ms per step: {times}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or file of a model")
    parser.add_argument("--shapes", default="1x1,2x1,3x1,1x2,1x3,2x2", help="tp x pp, by comma")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=128, help="tokens of each row")
    parser.add_argument("--steps", type=int, default=40)
    asked = parser.parse_args()
    folder = prepare(asked.model)
    best_library()  # built once, not by every rank
    for shape in asked.shapes.split(","):
        tp, pp = map(int, shape.split("x"))
        _measure((tp, pp), folder, asked)


if __name__ == "__main__":
    main()
