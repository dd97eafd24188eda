"""`python -m fastserve.worker.bench.kv`: how fast KV blocks move, against a plain memory copy.

Everything is measured in turn in one run, round after round, so that a busy machine slows all
alike; the median over the rounds is what counts. The pool is a file as the sidecar makes it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import xxhash

from fastserve.worker.model.kv_cache import zero_bytes
from fastserve.worker.staging.copier import Copier
from fastserve.worker.staging.host_pool import HostPool

_PAGE = 4096


class Bench:
    """`blocks` blocks of `block_bytes`, moved in random order between device and pool."""

    def __init__(
        self, blocks: int, block_bytes: int, folder: Path, device: str, small_pages: bool
    ) -> None:
        self.size = blocks * block_bytes
        slot = -(-block_bytes // _PAGE) * _PAGE
        with tempfile.NamedTemporaryFile(dir=folder, prefix="fastserve-bench-") as file:
            os.posix_fallocate(file.fileno(), 0, blocks * slot)
            self.pool = HostPool(Path(file.name), blocks * slot, slot, blocks)
        begun = time.perf_counter()
        self.pool.prepare(torch.device(device))
        self.prepared = time.perf_counter() - begun
        zeros = zero_bytes(self.size, torch.device(device))
        if small_pages:
            zeros = torch.zeros(self.size, dtype=torch.uint8)
        self.kv = zeros.view(blocks, block_bytes)
        self.kv.random_(0, 256)
        self.plain_source = np.random.default_rng(0).integers(0, 256, self.size, np.uint8)
        self.plain_target = np.zeros(self.size, np.uint8)
        self.copier = Copier(self.kv)
        order = np.random.default_rng(1).permutation(blocks)
        self.blocks, self.slots = order.tolist(), list(range(blocks))
        self.checksums = self.copier.out(self.pool, self.blocks, self.slots)

    def plain(self) -> None:
        """Between two ordinary arrays, which have huge pages if the kernel has any."""
        np.copyto(self.plain_target, self.plain_source)

    def whole_out(self) -> None:
        """The bytes of all blocks from the memory of the device to that of the pool, in one."""
        torch.from_numpy(self.pool.slots[:, : self.kv.shape[1]]).copy_(self.kv)

    def whole_back(self) -> None:
        self.kv.copy_(torch.from_numpy(self.pool.slots[:, : self.kv.shape[1]]))

    def out(self) -> None:
        self.copier.out(self.pool, self.blocks, self.slots)

    def out_unchecked(self) -> None:
        """The copies of `out` alone, for the cost of the checksum."""
        lane, width = self.copier.lane, self.kv.shape[1]
        pairs = zip(self.blocks, self.slots, strict=True)
        for wait in [lane.out(b, self.pool.slots[s, :width]) for b, s in pairs]:
            wait()

    def back(self) -> None:
        assert self.copier.back(self.pool, self.slots, self.blocks, self.checksums)

    def back_unchecked(self) -> None:
        self.copier.back(self.pool, self.slots, self.blocks, None)

    def checksum(self) -> None:
        """As on the disk's way back: of bytes that are in no cache."""
        for slot in self.slots:
            xxhash.xxh3_64_intdigest(self.pool.slots[slot, : self.kv.shape[1]].data)


def rates(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """GB/s of everything, one value per round."""
    parts: dict[str, Callable[[], None]] = {
        "plain copy, ordinary memory": bench.plain,
        "plain copy, device to host": bench.whole_out,
        "plain copy, host to device": bench.whole_back,
        "device to host": bench.out_unchecked,
        "device to host, checksum": bench.out,
        "host to device": bench.back_unchecked,
        "host to device, checksum": bench.back,
        "checksum alone": bench.checksum,
    }
    for run in parts.values():  # the first touches pages
        run()
    seen: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, run in parts.items():
            begun = time.perf_counter()
            run()
            seen[name].append(bench.size / (time.perf_counter() - begun) / 1e9)
    return seen


class Iterations:
    """A stand-in for decode iterations of a small model: one thread, products and some Python."""

    def __init__(self) -> None:
        self._weight = torch.randn(16, 576, 1536)
        self._rows = torch.randn(8, 576)

    def run(self) -> float:
        """Seconds of one iteration."""
        begun = time.perf_counter()
        for layer in self._weight:
            (self._rows @ layer).relu_()
            sum(range(500))  # what a scheduler's plan costs in between
        return time.perf_counter() - begun


def slowdown(bench: Bench, rounds: int) -> tuple[float, float, float]:
    """Median seconds of an iteration: alone, with half a block going out in each, as when every
    block of 8 rows is written through, and beside copies that never pause."""
    iterations, stop = Iterations(), threading.Event()

    def copy() -> None:
        while not stop.is_set():
            bench.out()

    alone, some, full = [], [], []
    with ThreadPoolExecutor(1) as copies:
        for _ in range(rounds):
            alone += [iterations.run() for _ in range(6)]
            for number in range(6):
                if number % 2:
                    copies.submit(bench.copier.out, bench.pool, [number], [number])
                some.append(iterations.run())
            stop.clear()
            copying = copies.submit(copy)
            full += [iterations.run() for _ in range(6)]
            stop.set()
            copying.result()
    return statistics.median(alone), statistics.median(some), statistics.median(full)


def _share(values: list[float], others: list[float]) -> str:
    """Compared round by round: what disturbs one of a round mostly disturbs both."""
    share = statistics.median(v / other for v, other in zip(values, others, strict=True))
    return f"{share:13.0%}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block-bytes", type=int, default=737280, help="SmolLM2-135M in fp32")
    parser.add_argument("--megabytes", type=int, default=256, help="to move in one operation")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--pool-dir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small-pages", action="store_true", help="4 KiB pages for the KV cache")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # as many as the copy thread is
    blocks = max(16, (asked.megabytes << 20) // asked.block_bytes)
    bench = Bench(blocks, asked.block_bytes, asked.pool_dir, asked.device, asked.small_pages)
    print(f"{blocks} blocks of {asked.block_bytes} bytes, {asked.rounds} rounds, {asked.device}")
    print(f"mapping the pool before use: {bench.prepared * 1e3:.0f} ms")
    seen = rates(bench, asked.rounds)
    print(f"{'':28}{'median GB/s':>12}{'best':>8}{'of the same':>13}{'of ordinary':>13}")
    for name, values in seen.items():
        print(f"{name:28}{statistics.median(values):12.2f}{max(values):8.2f}", end="")
        direction = "host to device" if name.startswith("host") else "device to host"
        print(_share(values, seen[f"plain copy, {direction}"]), end="")
        print(_share(values, seen["plain copy, ordinary memory"]))
    alone, some, full = slowdown(bench, asked.rounds)
    print(f"an iteration: alone {alone * 1e3:.1f} ms", end="")
    print(f", with half a block going out {some * 1e3:.1f} ms ({some / alone - 1:+.1%})", end="")
    print(f", beside copies without a pause {full * 1e3:.1f} ms ({full / alone - 1:+.1%})")


if __name__ == "__main__":
    main()
