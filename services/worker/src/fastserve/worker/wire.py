"""Between protobuf messages and the engine's own types."""

from __future__ import annotations

from fastserve.proto.v1 import sampling_pb2, worker_pb2
from fastserve.worker.engine import Iteration, NewJob, Plan
from fastserve.worker.job import Op, OpKind, OpStatus
from fastserve.worker.model.sampling import SamplingParams
from fastserve.worker.staging import Place

_OPS = {
    worker_pb2.KV_OP_OFFLOAD: OpKind.OFFLOAD,
    worker_pb2.KV_OP_UPLOAD: OpKind.UPLOAD,
    worker_pb2.KV_OP_DROP_DEVICE: OpKind.DROP_DEVICE,
    worker_pb2.KV_OP_DROP_HOST: OpKind.DROP_HOST,
    worker_pb2.KV_OP_RELEASE: OpKind.RELEASE,
    worker_pb2.KV_OP_COPY_OUT: OpKind.COPY_OUT,
    worker_pb2.KV_OP_EXPORT: OpKind.EXPORT,
}
_STATUS = {
    OpStatus.OK: worker_pb2.KV_STATUS_OK,
    OpStatus.NO_HOST_SPACE: worker_pb2.KV_STATUS_NO_HOST_SPACE,
    OpStatus.NO_DEVICE_SPACE: worker_pb2.KV_STATUS_NO_DEVICE_SPACE,
    OpStatus.LOST: worker_pb2.KV_STATUS_LOST,
    OpStatus.NOT_SENT: worker_pb2.KV_STATUS_NOT_SENT,
}
_FINISH = {
    "": sampling_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": sampling_pb2.FINISH_REASON_STOP,
    "length": sampling_pb2.FINISH_REASON_LENGTH,
}


class BadPlan(ValueError):
    """The plan is structurally wrong; the sentence says how."""


def plan_from(message: worker_pb2.Plan) -> Plan:
    """Decode a plan; raises `BadPlan` for arrays that do not belong together."""
    if len(message.row_handles) != len(message.row_tokens):
        raise BadPlan("row_handles and row_tokens differ in length")
    if not len(message.op_ids) == len(message.ops) == len(message.op_handles):
        raise BadPlan("op_ids, ops and op_handles differ in length")
    op_blocks = message.op_blocks or [0] * len(message.ops)
    if len(op_blocks) != len(message.ops):
        raise BadPlan("op_blocks and ops differ in length")
    if list(message.ops).count(worker_pb2.KV_OP_EXPORT) != len(message.export_to):
        raise BadPlan("export_to does not have an entry for each EXPORT")
    if len(set(message.row_handles)) != len(message.row_handles):
        raise BadPlan("a job has two rows")
    unknown = [op for op in message.ops if op not in _OPS]
    if unknown:
        raise BadPlan(f"unknown KV operation {unknown[0]}")
    places = iter(message.export_to)
    return Plan(
        plan_id=message.plan_id,
        lease=message.lease,
        new_jobs=[_job_from(job) for job in message.new_jobs],
        rows=list(zip(message.row_handles, message.row_tokens, strict=True)),
        ops=[
            Op(
                op_id,
                _OPS[kind],
                handle,
                blocks,
                _place_from(next(places)) if kind == worker_pb2.KV_OP_EXPORT else None,
            )
            for op_id, kind, handle, blocks in zip(
                message.op_ids, message.ops, message.op_handles, op_blocks, strict=True
            )
        ],
    )


def _place_from(message: worker_pb2.KvPlace) -> Place:
    return Place(message.worker_id, tuple(message.peers))


def _job_from(message: worker_pb2.Job) -> NewJob:
    if message.prompt_len > len(message.token_ids):
        raise BadPlan(f"job {message.job_id}: prompt_len exceeds its tokens")
    if len(message.sampling.logit_bias_ids) != len(message.sampling.logit_bias_values):
        raise BadPlan("logit_bias_ids and logit_bias_values differ in length")
    return NewJob(
        handle=message.handle,
        job_id=message.job_id,
        token_ids=list(message.token_ids),
        prompt_len=message.prompt_len,
        params=_sampling_from(message.sampling),
        traceparent=message.traceparent,
        salt=message.cache_salt,
        imported=message.imported_tokens,
    )


def _sampling_from(message: sampling_pb2.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_p=message.top_p or 1.0,  # proto3: 0 is "not set"
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty or 1.0,
        logit_bias=tuple(zip(message.logit_bias_ids, message.logit_bias_values, strict=True)),
        seed=message.seed,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        min_tokens=message.min_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def report_from(
    iteration: Iteration, epoch: int, free_device: int, free_host: int
) -> worker_pb2.IterationReport:
    """Encode what an iteration did."""
    report = worker_pb2.IterationReport(
        worker_epoch=epoch,
        plan_id=iteration.plan_id,
        iteration=iteration.iteration,
        row_handles=[row[0] for row in iteration.rows],
        row_new_tokens=[row[1] for row in iteration.rows],
        row_computed=[row[2] for row in iteration.rows],
        free_device_blocks=free_device,
        free_host_blocks=free_host,
        started_unix_s=iteration.started,
        seconds=iteration.seconds,
        context_tokens=iteration.context_tokens,
    )
    # Most iterations have none of the following, and every field that is named costs time.
    for handle in iteration.stalled:
        report.stalled_handles.append(handle)
    for op in iteration.ops:
        report.done_op_ids.append(op.op_id)
        report.done_status.append(_STATUS[op.status])
        report.done_tokens.append(op.tokens)
        report.done_bytes.append(op.bytes)
        report.done_seconds.append(op.seconds)
    for handle, why in iteration.failed:
        report.failed_handles.append(handle)
        report.failures.append(why)
    for handle, _, device, host in iteration.lookups:
        if device + host:
            report.cached_handles.append(handle)
            report.cached_tokens.append(device + host)
    for handle, index, sampled, finish in iteration.sampled:
        report.sampled_handles.append(handle)
        report.sampled_indexes.append(index)
        report.sampled_tokens.append(sampled.token)
        report.finish_reasons.append(_FINISH[finish])
        report.has_logprobs.append(int(sampled.logprob is not None))
        if sampled.logprob is not None:
            report.logprobs.append(sampled.logprob)
            report.top_counts.append(len(sampled.top))
            report.top_ids.extend(token for token, _ in sampled.top)
            report.top_logprobs.extend(value for _, value in sampled.top)
    return report
