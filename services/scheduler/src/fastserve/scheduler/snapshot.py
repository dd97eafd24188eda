"""The state of the moment, for consoles and tests."""

from __future__ import annotations

from collections.abc import Iterable

from fastserve.proto.v1 import scheduler_pb2
from fastserve.scheduler.core import Job, KvState, Scheduler
from fastserve.scheduler.worker_link import WorkerLink

_MOVING = (KvState.OFFLOADING, KvState.UPLOADING)


def snapshot(
    core: Scheduler,
    links: Iterable[WorkerLink],
    *,
    shard: str,
    epoch: int,
    durable: bool,
    uptime_s: float,
    now: float,
    include_jobs: bool,
) -> scheduler_pb2.SnapshotResponse:
    """Reads everything at once, so that the numbers belong together."""
    reply = scheduler_pb2.SnapshotResponse(
        shard=shard,
        epoch=epoch,
        policy=core.config.policy,
        durable=durable,
        uptime_s=uptime_s,
        level_depths=core.level_depths(),
        level_quanta_s=core.level_quanta(),
        workers=[_worker(core, link) for link in links],
        counters=core.counters,
    )
    if include_jobs:
        reply.jobs.extend(_job(job, now) for job in core.jobs())
    return reply


def _worker(core: Scheduler, link: WorkerLink) -> scheduler_pb2.WorkerState:
    described = link.described
    state = scheduler_pb2.WorkerState(
        address=link.address,
        connected=described is not None,
        iterations=link.iterations,
        iteration_s=link.iteration_s,
        sampled_tokens=link.sampled_tokens,
        processed_tokens=link.processed_tokens,
    )
    if described is not None:
        state.worker_id = described.worker_id
        state.model = described.model
        state.device_blocks = described.device_blocks
        state.free_device_blocks = link.free_device_blocks
        state.host_blocks = described.host_blocks
        state.free_host_blocks = link.free_host_blocks
        state.block_size = described.block_size
        state.draining = core.draining(described.worker_id)
        state.jobs, state.running = core.jobs_of(described.worker_id)
        cost = core.cost_model(described.worker_id)
        state.cost_model_error = cost.error
        state.decode_s = cost.decode_s
        state.prefill_tokens_per_s = cost.prefill_tokens_per_s
    return state


def _job(job: Job, now: float) -> scheduler_pb2.JobState:
    return scheduler_pb2.JobState(
        job_id=job.job_id,
        tenant=job.spec.tenant,
        state=job.state,
        kv="moving" if job.kv in _MOVING else job.kv,
        level=job.level,
        prompt_tokens=job.prompt_len,
        output_tokens=len(job.output),
        preemptions=job.preemptions,
        age_s=now - job.spec.arrival,
    )
