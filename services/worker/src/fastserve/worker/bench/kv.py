"""`python -m fastserve.worker.bench.kv`: how fast KV blocks move, against a plain memory copy.

Everything is measured in turn in one run, round after round, so that a busy machine slows all
alike; the median over the rounds is what counts. The pool is a file as the sidecar makes it, blocks
are those of the model. Then: what copies do to the model's iterations (`kv_beside.py`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xxhash

from fastserve.common.errors import StartupError
from fastserve.worker.bench.kv_beside import BLOCK, CONTEXT, ROWS, Decodes, slowdowns
from fastserve.worker.model.choose import choose, load
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.files import DEFAULT_MODEL, prepare
from fastserve.worker.model.kv_cache import KvCache, block_bytes
from fastserve.worker.staging.copier import Copier
from fastserve.worker.staging.host_pool import HostPool

_PAGE = 4096
_FEWEST = 256  # blocks


class Bench:
    """The blocks of `kv` (uint8 [blocks, block_bytes]), moved in random order to a pool in `folder`
    and back."""

    def __init__(self, kv: torch.Tensor, folder: Path) -> None:
        self.kv = kv
        blocks, block_bytes = kv.shape
        self.size = blocks * block_bytes
        slot = -(-block_bytes // _PAGE) * _PAGE
        with tempfile.NamedTemporaryFile(dir=folder, prefix="fastserve-bench-") as file:
            os.posix_fallocate(file.fileno(), 0, blocks * slot)
            self.pool = HostPool(Path(file.name), blocks * slot, slot, blocks)
        begun = time.perf_counter()
        self.pool.prepare(kv.device)
        self.prepared = time.perf_counter() - begun
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

    def out_plainly(self) -> None:
        """Block by block as the system copies memory (the device must be a CPU)."""
        device, width = self.kv.numpy(), self.kv.shape[1]
        for block, slot in zip(self.blocks, self.slots, strict=True):
            np.copyto(self.pool.slots[slot, :width], device[block])

    def one_out(self, blocks: Sequence[int], number: int) -> None:
        """One of `blocks`, with its checksum."""
        block = blocks[number % len(blocks)]
        self.copier.out(self.pool, [block], [block])

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
        "device to host, block by block": bench.out_plainly,
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


def _share(values: list[float], others: list[float]) -> str:
    """Compared round by round: what disturbs one of a round mostly disturbs both."""
    share = statistics.median(v / other for v, other in zip(values, others, strict=True))
    return f"{share:13.0%}"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder, .gguf file or the default")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--threads", type=int, default=0, help="of the model (0: all cores)")
    parser.add_argument("--megabytes", type=int, default=256, help="to move in one operation")
    parser.add_argument("--rounds", type=int, default=15, help="of copies")
    parser.add_argument(
        "--iteration-rounds", type=int, default=60, help="of iterations beside copies (0: none)"
    )
    parser.add_argument("--pool-dir", type=Path, default=Path("/dev/shm"))
    asked = parser.parse_args()
    try:
        folder = prepare(asked.model, progress=lambda line: print(line, file=sys.stderr))
        config = ModelConfig.from_folder(folder)
        way = choose(config, device=asked.device, dtype=asked.dtype, threads=asked.threads)
        model = load(folder, way)
    except StartupError as error:
        print(error, file=sys.stderr)
        return 2
    each = block_bytes(config, BLOCK, way.dtype)
    kv = KvCache(
        config, max(_FEWEST, (asked.megabytes << 20) // each), BLOCK, way.dtype, way.device
    )
    bench = Bench(kv.as_bytes(), asked.pool_dir)
    print(f"{folder.name}: {way.description}")
    print(f"{kv.num_blocks} blocks of {each} bytes, {asked.rounds} rounds")
    print(f"mapping the pool before use: {bench.prepared * 1e3:.0f} ms")
    seen = rates(bench, asked.rounds)
    print(f"{'':32}{'median GB/s':>12}{'best':>8}{'of the same':>13}{'of ordinary':>13}")
    for name, values in seen.items():
        print(f"{name:32}{statistics.median(values):12.2f}{max(values):8.2f}", end="")
        direction = "host to device" if name.startswith("host") else "device to host"
        print(_share(values, seen[f"plain copy, {direction}"]), end="")
        print(_share(values, seen["plain copy, ordinary memory"]))
    if asked.iteration_rounds:
        kv.data.zero_()
        decodes = Decodes(model, kv)
        unused = range(decodes.blocks, kv.num_blocks)
        copy = partial(bench.one_out, unused)
        alone, found = slowdowns(decodes, copy, asked.iteration_rounds)
        print(f"an iteration of {ROWS} rows, {CONTEXT} tokens each: {alone * 1e3:.2f} ms; beside")
        for one in found:
            print(f"  {one.name:20}{one.share:+8.2%}   (95 %: {one.low:+.2%} to {one.high:+.2%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
