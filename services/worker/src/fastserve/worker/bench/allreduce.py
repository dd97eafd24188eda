"""`python -m fastserve.worker.bench.allreduce`: the all-reduce of ranks on one host, shared memory
beside gloo, in turn in one run."""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.multiprocessing.spawn import spawn

from fastserve.worker.native.library import best_library
from fastserve.worker.parallel.comm import Comm, Distributed, SharedMemory
from fastserve.worker.parallel.groups import Group

_TURNS = 200  # of one way before the other has its turn


def _round(comm: Comm, size: int) -> list[float]:
    """Seconds of each all-reduce."""
    x, seconds = torch.ones(size), []
    for _ in range(_TURNS):
        begun = time.perf_counter()
        comm.reduce(x)
        seconds.append(time.perf_counter() - begun)
        x.fill_(1.0)
    return seconds


def _rank(rank: int, ranks: int, size: int, rounds: int, port: int) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False)
    group = Group(rank, ranks, 1, rank, True, "127.0.0.1", port)
    comms: list[Comm] = [
        SharedMemory(group, store, best_library(), 1 << 20),
        Distributed(group, store, torch.device("cpu")),
    ]
    seen: dict[str, list[float]] = {comm.name: [] for comm in comms}
    for turn in range(rounds + 1):
        for comm in comms:
            values = _round(comm, size)
            if turn:  # the first touches pages
                seen[comm.name] += values
    if rank == 0:
        for name, values in seen.items():
            cut = statistics.quantiles(values, n=100)
            print(
                f"{name:14} {ranks} ranks, {size} floats: median {cut[49] * 1e6:8.1f} us, "
                f"p99 {cut[98] * 1e6:8.1f} us"
            )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--floats", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=10)
    asked = parser.parse_args()
    best_library()  # built once, not by every rank
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (asked.ranks, asked.floats, asked.rounds, store.port)
    spawn(_rank, arguments, nprocs=asked.ranks)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
