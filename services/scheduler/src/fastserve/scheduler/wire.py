"""Worker protocol to core and back: handles, plans and reports of one stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from fastserve.proto.v1 import sampling_pb2, worker_pb2
from fastserve.scheduler.core import (
    CostSample,
    FinishReason,
    Inventory,
    KvOpKind,
    KvPlace,
    KvStatus,
    OpDone,
    Plan,
    PrefixCache,
    ProtocolError,
    Report,
    RowResult,
    SampledToken,
    WorkerInfo,
)
from fastserve.scheduler.jobs import JobRecord, TokenLogprobs

RESET_PLAN_ID: Final = 1  # plan ids are positive; those of the core follow, shifted by one

FINISH_TO_CORE: Final = {
    sampling_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    sampling_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    sampling_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    sampling_pb2.FINISH_REASON_FAILED: FinishReason.FAILED,
    sampling_pb2.FINISH_REASON_DEADLINE: FinishReason.DEADLINE,
}
FINISH_TO_WIRE: Final = {core: wire for wire, core in FINISH_TO_CORE.items()}

_OPS: Final = {
    KvOpKind.OFFLOAD: worker_pb2.KV_OP_OFFLOAD,
    KvOpKind.UPLOAD: worker_pb2.KV_OP_UPLOAD,
    KvOpKind.DROP_DEVICE: worker_pb2.KV_OP_DROP_DEVICE,
    KvOpKind.DROP_HOST: worker_pb2.KV_OP_DROP_HOST,
    KvOpKind.RELEASE: worker_pb2.KV_OP_RELEASE,
    KvOpKind.COPY_OUT: worker_pb2.KV_OP_COPY_OUT,
    KvOpKind.EXPORT: worker_pb2.KV_OP_EXPORT,
}
_STATUS: Final = {
    worker_pb2.KV_STATUS_OK: KvStatus.OK,
    worker_pb2.KV_STATUS_NO_HOST_SPACE: KvStatus.NO_HOST_SPACE,
    worker_pb2.KV_STATUS_NO_DEVICE_SPACE: KvStatus.NO_DEVICE_SPACE,
    worker_pb2.KV_STATUS_LOST: KvStatus.LOST,
    worker_pb2.KV_STATUS_NOT_SENT: KvStatus.NOT_SENT,
}


def worker_info(described: worker_pb2.DescribeResponse) -> WorkerInfo:
    """Raises `ProtocolError` for limits that make no sense."""
    try:
        return _worker_info(described)
    except ValueError as error:
        raise ProtocolError(str(error)) from error


def _worker_info(described: worker_pb2.DescribeResponse) -> WorkerInfo:
    return WorkerInfo(
        worker_id=described.worker_id,
        block_size=described.block_size,
        device_blocks=described.device_blocks,
        host_blocks=described.host_blocks,
        max_num_seqs=described.max_num_seqs,
        max_num_batched_tokens=described.max_num_batched_tokens,
        max_model_len=described.max_model_len,
        prefill_sample=_cost(described.prefill_cost),
        decode_sample=_cost(described.decode_cost),
    )


def _cost(sample: worker_pb2.CostSample) -> CostSample:
    return CostSample(
        rows=sample.rows,
        new_tokens=sample.new_tokens,
        context_tokens=sample.context_tokens,
        seconds=sample.seconds,
    )


def inventory_of(report: worker_pb2.IterationReport) -> Inventory:
    """Raises `ProtocolError` for arrays that do not match."""
    held = report.inventory
    try:
        return Inventory(
            device_tokens=dict(zip(held.job_ids, held.device_tokens, strict=True)),
            host_tokens=dict(zip(held.job_ids, held.host_tokens, strict=True)),
            place=place_of(held.place),
        )
    except ValueError as error:
        raise ProtocolError("inventory with arrays of unequal length") from error


def place_of(told: worker_pb2.KvPlace) -> KvPlace | None:
    """None: nobody can send KV there."""
    return KvPlace(told.worker_id, told.layout, tuple(told.peers)) if told.peers else None


def reset_plan(shard: str, epoch: int) -> worker_pb2.RunRequest:
    """The first plan of a stream."""
    return worker_pb2.RunRequest(
        plan=worker_pb2.Plan(plan_id=RESET_PLAN_ID, scheduler_epoch=epoch, reset=True, shard=shard)
    )


class StreamCodec:
    """Names jobs by small handles for the life of one stream."""

    def __init__(
        self,
        epoch: int,
        record_of: Callable[[str], JobRecord | None],
        prefix_cache: PrefixCache,
    ) -> None:
        """`record_of` finds the job of an id; unknown ones can only be released."""
        self._prefix_cache = prefix_cache
        self._epoch = epoch
        self._record_of = record_of
        self._handles: dict[str, int] = {}
        self._job_ids: dict[int, str] = {}
        self._releases: dict[int, int] = {}  # op id -> handle
        self._last_handle = 0

    def encode(self, plan: Plan) -> worker_pb2.RunRequest:
        """A job travels whole the first time a plan names it, and when the core wants that."""
        request = worker_pb2.RunRequest()
        wire = request.plan
        wire.plan_id = plan.plan_id + RESET_PLAN_ID
        wire.scheduler_epoch = self._epoch
        wire.lease = plan.lease
        wire.may_leave = plan.may_leave
        for job_id, imported in plan.introduce.items():
            self._job_ids.pop(self._handles.pop(job_id, 0), None)
            self._handle(job_id, wire)
            wire.new_jobs[-1].imported_tokens = imported
        for row in plan.rows:
            wire.row_handles.append(self._handle(row.job.spec.job_id, wire))
            wire.row_tokens.append(row.tokens)
        for op in plan.ops:
            handle = self._handle(op.job_id, wire)
            wire.op_ids.append(op.op_id)
            wire.ops.append(_OPS[op.kind])
            wire.op_handles.append(handle)
            wire.op_blocks.append(op.blocks)
            if op.to is not None:
                worker_id, layout, peers = op.to
                wire.export_to.add(worker_id=worker_id, layout=layout, peers=peers)
            if op.kind is KvOpKind.RELEASE:
                self._releases[op.op_id] = handle
        return request

    def _handle(self, job_id: str, wire: worker_pb2.Plan) -> int:
        handle = self._handles.get(job_id)
        if handle is None:
            self._last_handle = handle = self._last_handle + 1
            self._handles[job_id] = handle
            self._job_ids[handle] = job_id
            job = wire.new_jobs.add(handle=handle, job_id=job_id)
            record = self._record_of(job_id)
            if record is not None:
                job.token_ids.extend(record.spec.prompt)
                job.token_ids.extend(record.output)
                job.prompt_len = len(record.spec.prompt)
                job.sampling.CopyFrom(record.sampling)
                job.traceparent = record.traceparent
                job.cache_salt = self._prefix_cache.salt(record.spec)
        return handle

    def decode(self, wire: worker_pb2.IterationReport) -> Report:
        """Raises `ProtocolError` for arrays that do not match and handles nobody gave out."""
        try:
            report = self._decode(wire)
        except KeyError as error:
            raise ProtocolError(f"report names an unknown handle or code: {error}") from error
        except ValueError as error:
            raise ProtocolError(f"report with arrays of unequal length: {error}") from error
        for op_id in wire.done_op_ids:
            handle = self._releases.pop(op_id, None)
            if handle is not None:
                del self._handles[self._job_ids.pop(handle)]
        return report

    def _decode(self, wire: worker_pb2.IterationReport) -> Report:
        ids = self._job_ids
        return Report(
            plan_id=wire.plan_id - RESET_PLAN_ID,
            iteration=wire.iteration,
            rows=[
                RowResult(ids[handle], new_tokens, computed)
                for handle, new_tokens, computed in zip(
                    wire.row_handles, wire.row_new_tokens, wire.row_computed, strict=True
                )
            ],
            sampled=[
                SampledToken(ids[handle], index, token, FINISH_TO_CORE[end] if end else None)
                for handle, index, token, end in zip(
                    wire.sampled_handles,
                    wire.sampled_indexes,
                    wire.sampled_tokens,
                    wire.finish_reasons,
                    strict=True,
                )
            ],
            cached=[
                (ids[handle], tokens)
                for handle, tokens in zip(wire.cached_handles, wire.cached_tokens, strict=True)
            ],
            ops=[
                OpDone(op_id, _STATUS[status], tokens, size, seconds)
                for op_id, status, tokens, size, seconds in zip(
                    wire.done_op_ids,
                    wire.done_status,
                    wire.done_tokens,
                    wire.done_bytes,
                    wire.done_seconds,
                    strict=True,
                )
            ],
            stalled=[ids[handle] for handle in wire.stalled_handles],
            failed=[
                (ids[handle], message)
                for handle, message in zip(wire.failed_handles, wire.failures, strict=True)
            ],
            free_device_blocks=wire.free_device_blocks,
            free_host_blocks=wire.free_host_blocks,
            seconds=wire.seconds,
            context_tokens=wire.context_tokens,
        )


def logprobs_of(wire: worker_pb2.IterationReport) -> dict[int, TokenLogprobs]:
    """Log-probabilities by position in the sampled arrays; empty if no job asked for them."""
    found: dict[int, TokenLogprobs] = {}
    entry = start = 0
    for position, has in enumerate(wire.has_logprobs):
        if has:
            end = start + wire.top_counts[entry]
            found[position] = TokenLogprobs(
                wire.logprobs[entry], wire.top_ids[start:end], wire.top_logprobs[start:end]
            )
            entry, start = entry + 1, end
    return found


def phase_of(rows: Sequence[int]) -> str:
    """Kind of an iteration by the tokens its rows processed."""
    if all(tokens == 1 for tokens in rows):
        return "decode"
    return "prefill" if all(tokens > 1 for tokens in rows) else "mixed"
