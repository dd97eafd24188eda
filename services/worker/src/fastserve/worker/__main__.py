"""`python -m fastserve.worker`: the worker process."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import sys
import time
from typing import Any

import psutil
import structlog
import torch

from fastserve.common.errors import StartupError
from fastserve.common.lifecycle import announce_ready, run_service
from fastserve.common.rpc import GrpcServer
from fastserve.common.telemetry import serve_metrics
from fastserve.common.tls import load_tls
from fastserve.proto.v1 import worker_pb2 as pb
from fastserve.proto.v1 import worker_pb2_grpc as pb_grpc
from fastserve.worker.calibrate import measure
from fastserve.worker.engine import Engine, ForwardModel
from fastserve.worker.engine_thread import EngineThread
from fastserve.worker.metrics import Metrics
from fastserve.worker.model.choose import AnyModel, Way, choose, load
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.files import prepare
from fastserve.worker.model.kv_cache import KvCache, block_bytes
from fastserve.worker.model.native import NativeModel
from fastserve.worker.mover import StagingMover
from fastserve.worker.parallel.control import Followers, GroupStaging
from fastserve.worker.parallel.launcher import launch
from fastserve.worker.parallel.model import GroupModel
from fastserve.worker.parallel.rank import (
    Rank,
    choose_way,
    follow_group,
    group_model,
    join,
    load_stage,
    wanted,
)
from fastserve.worker.parallel.watch import lost
from fastserve.worker.service import Worker
from fastserve.worker.settings import Settings
from fastserve.worker.staging import KvStaging, SidecarLost
from fastserve.worker.staging.types import rank_name

log = structlog.get_logger(__name__)
_LAST_REPORTS_S = 0.5
_TOKENS_PER_SEQUENCE = 1024  # what --kv-blocks defaults to provide for, on a CPU


def _kv_cache(settings: Settings, model: AnyModel, rank: Rank | None) -> KvCache:
    size = block_bytes(model.config, settings.block_size, model.dtype)
    blocks = settings.kv_blocks
    if blocks is None:
        if model.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(model.device)
            blocks = int(free - total * (1 - settings.gpu_memory_utilization)) // size
        else:
            wanted_blocks = settings.max_num_seqs * -(-_TOKENS_PER_SEQUENCE // settings.block_size)
            sharing = rank.group.size if rank is not None and rank.group.one_host else 1
            blocks = min(wanted_blocks, psutil.virtual_memory().available // 4 // size // sharing)
    if rank is not None:
        blocks = min(rank.agree("blocks", blocks))
    if blocks < 1:
        raise StartupError("no memory is left for KV blocks: choose a smaller model or --kv-blocks")
    return KvCache(model.config, blocks, settings.block_size, model.dtype, model.device)


def _max_model_len(settings: Settings, config: ModelConfig) -> int:
    limit = config.max_position_embeddings
    if settings.max_model_len is not None and settings.max_model_len > limit:
        raise StartupError(
            f"--max-model-len {settings.max_model_len} exceeds the model's limit of {limit}"
        )
    return settings.max_model_len or limit


async def _attach_staging(
    settings: Settings,
    epoch: int,
    config: ModelConfig,
    way: Way,
    kv: KvCache,
    rank: Rank | None = None,
    followers: Followers | None = None,
) -> KvStaging:
    # The kernels lay out a block in another way, and other weights make other keys and values.
    layout = "native" if way.library else "torch"
    meaning = f"{config}:{way.dtype}:{way.int8}:{layout}:{kv.block_size}"
    worker_id = settings.worker_id
    if rank is not None:
        meaning += f":{rank.group.tp}x{rank.group.pp}"
        worker_id = rank_name(worker_id, rank.group.rank)
    arguments = (
        settings.kv_offload,
        worker_id,
        epoch,
        kv.as_bytes(),
        kv.block_size,
        hashlib.sha256(meaning.encode()).hexdigest()[:16],
    )
    staging = (
        KvStaging(*arguments)
        if followers is None
        else GroupStaging(*arguments, followers=followers)
    )
    try:
        await staging.attach()
    except SidecarLost as error:
        # Not fatal: without host memory preempted jobs are recomputed, and it may come later.
        log.warning("kv-offload is not there yet", reason=str(error))
    return staging


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Load the model, then serve until `stop` is set."""
    tls = load_tls(settings)
    rank = None
    if wanted(settings) > 1:
        if "RANK" not in os.environ:
            await launch(wanted(settings), stop)
            return
        rank = join(settings)
    folder = prepare(settings.model, progress=lambda line: log.info("model", step=line))
    config = ModelConfig.from_folder(folder)
    max_model_len = _max_model_len(settings, config)
    model: AnyModel
    runs: ForwardModel
    group: GroupModel | None = None
    if rank is None:
        way = choose(
            config,
            device=settings.device,
            dtype=settings.dtype,
            quantization=settings.quantization,
            cpu_kernels=settings.cpu_kernels,
            block_size=settings.block_size,
            threads=settings.threads,
        )
        runs = model = load(folder, way, settings.block_size)
    else:
        way = choose_way(settings, config, rank.group)
        stage = load_stage(rank, settings, folder, way)
        model = stage.model
        runs = group = group_model(stage, folder)
    log.info("the model is loaded", folder=str(folder), runs=way.description)
    kv = _kv_cache(settings, model, rank)
    epoch = time.time_ns()
    sizes = None
    if rank is not None:
        epoch = rank.agree("epoch", epoch)[0]
        sizes = rank.agree("block_bytes", kv.block_bytes)
        if rank.group.rank:
            own = None
            if settings.kv_offload:
                own = await _attach_staging(settings, epoch, model.config, way, kv, rank)
            await follow_group(rank, stage, kv, own)
            return

    loop = asyncio.get_running_loop()
    followers = None
    if rank is not None:
        followers = Followers(rank.group, lost)
        await followers.start(rank.store)
    prefill, decode = measure(runs, kv, settings.max_num_batched_tokens)
    metrics = Metrics(settings.served_model_name or folder.name, kv.block_size, kv.num_blocks)
    if group is not None:
        group.observe = metrics.communicated
    staging = None
    if settings.kv_offload:
        staging = await _attach_staging(settings, epoch, model.config, way, kv, rank, followers)
        metrics.sidecar_losses.set_function(lambda: staging.losses)
    thread = EngineThread(loop)
    if isinstance(model, NativeModel):
        model.bell = thread.bell()
    mover = StagingMover(thread, loop, staging, metrics)
    engine = Engine(
        runs,
        kv,
        mover,
        eos_token_ids=frozenset(config.eos_token_ids),
        max_model_len=max_model_len,
        vocab_size=config.vocab_size,
    )
    block_total = kv.block_bytes if sizes is None else sum(sizes)
    description = pb.DescribeResponse(
        worker_id=settings.worker_id,
        epoch=epoch,
        model=settings.served_model_name or folder.name,
        dtype="int8" if way.int8 else str(way.dtype).removeprefix("torch."),
        device=way.device.type,
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        block_size=kv.block_size,
        block_bytes=block_total,
        device_blocks=kv.num_blocks,
        host_blocks=staging.host_blocks if staging is not None else 0,
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        prefill_cost=prefill,
        decode_cost=decode,
    )
    worker = Worker(description, engine, thread, mover, metrics)
    gc.collect()
    gc.freeze()  # what is here now stays; to walk it again would hold up an iteration
    server = GrpcServer()
    pb_grpc.add_WorkerServiceServicer_to_server(worker, server.server)
    thread.start(engine, worker.report)
    try:
        info: dict[str, str | int] = {"address": await server.start(settings.listen, tls)}
        if settings.health_listen:
            info["health_address"] = await server.start_health(settings.health_listen)
        info["metrics_port"] = serve_metrics(
            metrics.registry, settings.metrics_host, settings.metrics_port
        )
        await server.set_serving(True)
        announce_ready(settings, **info)
        await _until(stop, thread.failure)
        await server.set_serving(False)
        if not await worker.leave(settings.shutdown_timeout):
            log.warning("leaving before all jobs were taken away", advice="--shutdown-timeout")
        await server.stop(_LAST_REPORTS_S)
    finally:
        await thread.stop()
        if staging is not None:
            await staging.close()
        if rank is not None and followers is not None and group is not None:
            rank.watchdog.stop()
            if not thread.failure.done():
                group.stop()
            await followers.close()


async def _until(stop: asyncio.Event, failure: asyncio.Future[None]) -> None:
    """Wait for `stop`. A failure of the engine ends the process: it is restarted."""
    stopping = asyncio.ensure_future(stop.wait())
    either: set[asyncio.Future[Any]] = {stopping, failure}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if failure.done():
        failure.result()


if __name__ == "__main__":
    sys.exit(run_service("worker", Settings, serve))
