"""The life of a rank: join the group, load a shard, and at all but rank 0, follow."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import structlog
import torch
from torch._C._distributed_c10d import Store, TCPStore

from fastserve.common.errors import StartupError
from fastserve.worker.cores import usable_cores
from fastserve.worker.model.choose import Way, choose
from fastserve.worker.model.config import OPT, ModelConfig
from fastserve.worker.model.kv_cache import KvCache
from fastserve.worker.model.loader import load_model
from fastserve.worker.model.memory import announced
from fastserve.worker.native.build import NativeError
from fastserve.worker.native.library import best_library
from fastserve.worker.parallel.comm import Comm, Distributed, SharedMemory
from fastserve.worker.parallel.control import obey
from fastserve.worker.parallel.groups import Group, GroupLost
from fastserve.worker.parallel.model import GroupModel, Stage, follow
from fastserve.worker.parallel.shards import shard_of, split
from fastserve.worker.parallel.watch import LOST_S, Watchdog
from fastserve.worker.settings import Settings
from fastserve.worker.staging import KvStaging

log = structlog.get_logger(__name__)
_RENDEZVOUS = timedelta(seconds=600)  # loading included


def wanted(settings: Settings) -> int:
    """Ranks in the group that the settings ask for."""
    return settings.tensor_parallel_size * settings.pipeline_parallel_size


@dataclass(frozen=True, slots=True)
class Rank:
    """A place in a group that is alive."""

    group: Group
    store: Store
    watchdog: Watchdog

    def agree(self, name: str, value: int) -> list[int]:
        """What each rank says, in the order of ranks; waits for all."""
        self.store.set(f"{name}/{self.group.rank}", str(value))
        return [int(self.store.get(f"{name}/{rank}")) for rank in range(self.group.size)]


def join(settings: Settings) -> Rank:
    """Meet the other ranks at MASTER_ADDR:MASTER_PORT. Raises `StartupError`."""
    group = Group.from_environment(
        os.environ, settings.tensor_parallel_size, settings.pipeline_parallel_size
    )
    try:
        store = _store(group, master=group.rank == 0)
        beats = _store(group, master=False)  # calls block each other on one connection
    except RuntimeError as error:
        raise StartupError(f"no rendezvous at {group.address}:{group.port}: {error}") from error
    return Rank(group, store, Watchdog(beats, group))


def _store(group: Group, *, master: bool) -> Store:
    return TCPStore(
        group.address,
        group.port,
        group.size,
        is_master=master,
        timeout=_RENDEZVOUS,
        wait_for_workers=False,
    )


def choose_way(settings: Settings, config: ModelConfig, group: Group) -> Way:
    """Ranks run in PyTorch. Raises `StartupError` for settings that they cannot keep."""
    if config.architecture == OPT:
        raise StartupError("OPT models run in a single rank")
    if settings.quantization != "none":
        raise StartupError("quantization is for a single rank")
    if settings.cpu_kernels == "native":
        raise StartupError("the CPU kernels are for a single rank: leave --cpu-kernels out")
    cores = usable_cores()
    way = choose(
        config,
        device=settings.device,
        dtype=settings.dtype,
        cpu_kernels="torch",
        block_size=settings.block_size,
        threads=settings.threads or max(1, cores // group.size if group.one_host else cores),
    )
    if way.device.type == "cuda":
        torch.cuda.set_device(group.local_rank)
        return replace(way, device=torch.device("cuda", group.local_rank))
    torch.set_num_threads(way.threads)
    return way


def load_stage(rank: Rank, settings: Settings, folder: Path, way: Way) -> Stage:
    """Read this rank's shard and connect to the others. Raises `ModelError`, `StartupError`."""
    config = ModelConfig.from_folder(folder)
    shard = shard_of(config, rank.group)
    with announced(config, way.dtype, shard=shard):
        model = load_model(folder, way.dtype, way.device, shard=shard)
    comm = _connect(rank, settings, config, way)
    log.info("a rank is ready", rank=rank.group.rank, communication=comm.name)
    return Stage(rank.group, shard, model, comm)


def _connect(rank: Rank, settings: Settings, config: ModelConfig, way: Way) -> Comm:
    kind = settings.communication
    if kind not in ("auto", "shared-memory", "distributed"):
        raise StartupError(f"communication {kind!r} is not one of auto, shared-memory, distributed")
    why = "" if rank.group.one_host else "the ranks are on several hosts"
    why = "the device is a GPU" if way.device.type == "cuda" else why
    if kind != "distributed" and not why:
        # Every rank must decide alike, so what fails here is an error, never another way.
        try:
            # All hidden states of an iteration fit, so no stage ever waits for the next one.
            size = settings.max_num_batched_tokens * config.hidden_size * 4
            return SharedMemory(rank.group, rank.store, best_library(), size)
        except (NativeError, OSError) as error:
            raise StartupError(
                f"no shared memory ({error}): ask for --communication distributed"
            ) from error
    if kind == "shared-memory":
        raise StartupError(f"ranks cannot use shared memory: {why}")
    return Distributed(rank.group, rank.store, way.device)


def group_model(stage: Stage, folder: Path) -> GroupModel:
    """For rank 0."""
    whole = ModelConfig.from_folder(folder)
    return GroupModel(stage, whole, split(whole.vocab_size, stage.group.tp))


async def follow_group(rank: Rank, stage: Stage, kv: KvCache, staging: KvStaging | None) -> None:
    """Until rank 0 ends the group. Raises `GroupLost` if something else does."""
    running = asyncio.ensure_future(asyncio.to_thread(follow, stage, kv))
    obeying = asyncio.ensure_future(obey(rank.group, rank.store, staging))
    await asyncio.wait([running, obeying], return_when=asyncio.FIRST_COMPLETED)
    if not running.done():  # the word to stop comes before the connection is closed
        await asyncio.wait([running], timeout=LOST_S)
    if not running.done() or running.exception() is not None:
        reason = repr(running.exception()) if running.done() else "rank 0 is gone"
        log.error("the group is lost", reason=reason)
        os._exit(1)  # the thread may hang in a collective
    rank.watchdog.stop()
    if obeying.done() and obeying.exception() is not None:
        raise GroupLost("the connection to rank 0 failed") from obeying.exception()
    obeying.cancel()
    if staging is not None:
        await staging.close()
