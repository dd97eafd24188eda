"""Many jobs at once through the real sidecar, host and disk, with copies that take their time: an
upload never shows bytes of another job or of an earlier state, and no block is used early."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastserve.worker.staging import BlockRef, HostCopyLost, KvStaging, NoHostSpace
from fastserve.worker.staging.copier import Copier, CpuLane, Wait
from fastserve.worker.staging.host_pool import Bytes
from support.processes import Running, service
from support.waiting import eventually

BLOCKS, BLOCK_BYTES, TOKENS = 44, 12288, 4
HOST, DISK = 16, 40
ROUNDS = 25


class DelayedLane(CpuLane):
    """The bytes are read at one moment and written at a later one: a slot or a block that is
    anybody else's in between is spoilt, or spoils the copy."""

    def __init__(self, kv: torch.Tensor, seed: int) -> None:
        super().__init__(kv)
        self._random = random.Random(seed)

    def out(self, block: int, slot: Bytes) -> Wait:
        return lambda: self._late(slot, self._kv[block])

    def back(self, slot: Bytes, block: int) -> Wait:
        return lambda: self._late(self._kv[block], slot)

    def _late(self, into: Bytes, source: Bytes) -> None:
        time.sleep(self._random.random() * 0.002)
        read = source.copy()
        time.sleep(self._random.random() * 0.002)
        np.copyto(into, read)


class Blocks:
    """Device blocks: a free one is scribbled on at once, as its next owner would do."""

    def __init__(self, kv: torch.Tensor) -> None:
        self.kv = kv.numpy()
        self.free = list(range(BLOCKS))
        self.scribbles = 0

    def take(self, count: int) -> list[int]:
        random.shuffle(self.free)
        return [self.free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        for block in blocks:
            self.scribbles += 1
            self.kv[block] = self.scribbles % 251
        self.free += blocks


def pattern(job: str, index: int, version: int) -> Bytes:
    rng = np.random.default_rng([ord(job), index, version])
    return rng.integers(0, 256, BLOCK_BYTES, np.uint8)


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Running]:
    flags = ["--listen", f"unix:{tmp_path}/s", "--host-blocks", str(HOST)]
    flags += ["--pool-dir", str(tmp_path), "--disk-path", str(tmp_path)]
    flags += ["--disk-size", str(DISK * BLOCK_BYTES)]
    with service("fastserve.kv_offload", tmp_path, *flags) as running:
        yield running


def staging_for(sidecar: Running, kv: torch.Tensor, epoch: int, seed: int) -> KvStaging:
    staging = KvStaging(sidecar.info["address"], "w", epoch, kv, TOKENS, "layout")
    staging._copier = Copier(kv, DelayedLane(kv, seed))
    return staging


async def life(
    job: str, staging: KvStaging, blocks: Blocks, seed: int, happened: Counter[str]
) -> None:
    """One job: grows on the device, leaves, comes back, is compared; operations in order, as
    `KvOps` sees to."""
    rng = random.Random(seed)
    versions: list[int] = []  # of each block on the host
    for round_ in range(ROUNDS):
        # What changes since the last time: perhaps the last block, and new ones.
        first = rng.randint(max(0, len(versions) - 1), len(versions))
        count = rng.randint(1, 3)
        mine = blocks.take(count)
        for index, block in enumerate(mine, first):
            blocks.kv[block] = pattern(job, index, round_)
        refs = [BlockRef(index, block, TOKENS) for index, block in enumerate(mine, first)]
        try:
            await staging.store(job, refs)
            versions[first:] = [round_] * count
            happened["stored"] += 1
        except NoHostSpace:
            happened["refused"] += 1
        finally:
            blocks.give_back(mine)
        await asyncio.sleep(0)
        if versions:
            mine = blocks.take(len(versions))
            await staging.load(job, mine)
            for index, (block, version) in enumerate(zip(mine, versions, strict=True)):
                assert (blocks.kv[block] == pattern(job, index, version)).all(), "other bytes"
            happened["loaded"] += 1
            blocks.give_back(mine)
        if len(versions) > 5 or rng.random() < 0.1:
            await staging.release([job])
            versions.clear()
            with pytest.raises(HostCopyLost):
                await staging.load(job, [0])
    await staging.release([job])


async def cache(
    staging: KvStaging, blocks: Blocks, seed: int, done: asyncio.Event, happened: Counter[str]
) -> None:
    """The prefix cache in what room the jobs leave: what comes is what its key says. Some blocks
    change during their copy, which is not to be kept then."""
    rng = random.Random(seed)
    texts = "uvwx"  # a chain of keys each
    while not done.is_set():
        text = rng.choice(texts)
        keys = [f"{text}{index}".encode() for index in range(rng.randint(1, 4))]
        mine = blocks.take(len(keys))
        try:
            if rng.random() < 0.5:
                for index, block in enumerate(mine):
                    blocks.kv[block] = pattern(text, index, 0)
                spoilt = rng.choice([*range(len(keys)), None, None])

                def intact(keys: list[bytes] = keys, spoilt: int | None = spoilt) -> list[bytes]:
                    return [b"" if index == spoilt else key for index, key in enumerate(keys)]

                copy = asyncio.create_task(staging.save(mine, intact))
                if spoilt is not None:
                    blocks.kv[mine[spoilt]] = 77
                await copy
                happened["cached"] += 1
            else:
                copied = await staging.fetch(keys, mine)
                for index, block in enumerate(mine[: copied.tokens // TOKENS]):
                    assert (blocks.kv[block] == pattern(text, index, 0)).all(), "other bytes"
                happened["found" if copied.tokens else "missed"] += 1
        except NoHostSpace:
            happened["no room for the cache"] += 1
        finally:
            blocks.give_back(mine)
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(3))
async def test_every_upload_shows_what_was_stored_last(sidecar: Running, seed: int) -> None:
    kv = torch.zeros(BLOCKS, BLOCK_BYTES, dtype=torch.uint8)
    blocks, happened = Blocks(kv), Counter[str]()
    staging = staging_for(sidecar, kv, 1, seed)
    await staging.attach()
    assert staging.host_blocks == HOST + DISK - 2
    try:
        async with asyncio.timeout(100):
            jobs = [
                life(job, staging, blocks, seed * 10 + n, happened) for n, job in enumerate("abcde")
            ]
            done = asyncio.Event()
            caching = asyncio.create_task(cache(staging, blocks, seed, done, happened))
            await asyncio.gather(*jobs)
            done.set()
            await caching
        assert happened["stored"] and happened["loaded"]
        assert happened["cached"] and happened["found"] and happened["missed"]
        metrics = sidecar.metrics()
        for direction in ("in", "out"):
            labels = f'{{direction="{direction}",tier="disk"}}'
            assert metrics[f"fastserve_kv_tier_bytes_total{labels}"] > 0, "the disk was not used"
        assert len(blocks.free) == BLOCKS
        assert await staging.inventory() == {}
        assert staging.free_host_blocks == staging.host_blocks
    finally:
        await staging.close()


async def test_the_lease_is_kept_while_there_is_nothing_to_say(tmp_path: Path) -> None:
    flags = ["--listen", f"unix:{tmp_path}/s", "--host-blocks", "4", "--owner-lease", "2"]
    with service("fastserve.kv_offload", tmp_path, *flags, "--pool-dir", str(tmp_path)) as running:
        kv = torch.zeros(BLOCKS, BLOCK_BYTES, dtype=torch.uint8)
        blocks = Blocks(kv)
        staging = staging_for(running, kv, 1, 0)
        blocks.kv[0] = pattern("a", 0, 0)
        await staging.store("a", [BlockRef(0, 0, TOKENS)])
        generation = staging.generation
        begun = time.monotonic()
        await eventually(lambda: time.monotonic() - begun > 3.0, "more than a lease")
        await staging.load("a", [1])
        assert (blocks.kv[1] == pattern("a", 0, 0)).all()
        assert staging.generation == generation
        await staging.close()


async def test_a_host_copy_that_changed_is_lost_only_if_somebody_looks(tmp_path: Path) -> None:
    for verify, flag in ((True, "--verify"), (False, "--no-verify")):
        flags = ["--listen", f"unix:{tmp_path}/s", "--host-blocks", "4", flag]
        with service(
            "fastserve.kv_offload", tmp_path, *flags, "--pool-dir", str(tmp_path)
        ) as running:
            kv = torch.zeros(BLOCKS, BLOCK_BYTES, dtype=torch.uint8)
            staging = staging_for(running, kv, 1, 0)
            await staging.store("a", [BlockRef(n, n, TOKENS) for n in range(3)])
            (pool,) = tmp_path.glob("fastserve-kv-*")
            with pool.open("r+b") as file:
                file.seek(BLOCK_BYTES + 5)
                file.write(b"\xff")
            if verify:
                with pytest.raises(HostCopyLost, match="checksum"):
                    await staging.load("a", [4, 5, 6])
                assert await staging.inventory() == {}
                assert running.metrics()['fastserve_kv_verify_failures_total{tier="host"}'] == 1
            else:
                await staging.load("a", [4, 5, 6])
                assert kv[5, 5] == 255
            await staging.close()
