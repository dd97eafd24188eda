"""Gateway protocol to core and back: submissions, refusals and packed token batches."""

from __future__ import annotations

import math
import re
from typing import Final

from fastserve.proto.v1 import sampling_pb2, scheduler_pb2
from fastserve.scheduler.clock import Clock
from fastserve.scheduler.core import JobSpec, Rejection, RejectReason
from fastserve.scheduler.jobs import JobRecord
from fastserve.scheduler.wire import FINISH_TO_WIRE

# Part of Redis keys and of lines in the write script.
_JOB_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_CLASSES: Final = ("interactive", "default", "batch")
_REASONS: Final = {
    RejectReason.QUEUE_FULL: scheduler_pb2.REJECT_REASON_QUEUE_FULL,
    RejectReason.NO_WORKER: scheduler_pb2.REJECT_REASON_NO_WORKER,
    RejectReason.DRAINING: scheduler_pb2.REJECT_REASON_DRAINING,
    RejectReason.TOO_LONG: scheduler_pb2.REJECT_REASON_TOO_LONG,
    RejectReason.INVALID: scheduler_pb2.REJECT_REASON_INVALID,
    RejectReason.ALREADY_EXISTS: scheduler_pb2.REJECT_REASON_ALREADY_EXISTS,
    RejectReason.DEADLINE: scheduler_pb2.REJECT_REASON_DEADLINE,
    RejectReason.NOT_FOUND: scheduler_pb2.REJECT_REASON_NOT_FOUND,
}
# Tokens in one message at most: a long replay must not become one huge message.
_MAX_TOKENS: Final = 8192


def invalid(message: str) -> Rejection:
    return Rejection(RejectReason.INVALID, message, 0)


def spec_of(submit: scheduler_pb2.Submit, clock: Clock) -> JobSpec | Rejection:
    """The core's view of a submission, or why it makes no sense."""
    if not _JOB_ID.fullmatch(submit.job_id):
        return invalid("job_id must be 1 to 128 letters, digits or any of ._:-")
    if not submit.prompt_token_ids:
        return invalid("the prompt is empty")
    if submit.sampling.max_tokens < 1:
        return invalid("max_tokens must be at least 1")
    service_class = submit.service_class or "default"
    if service_class not in _CLASSES:
        return invalid(f"service_class must be one of {', '.join(_CLASSES)}")
    deadline = submit.deadline_unix_s
    if not math.isfinite(deadline) or deadline < 0:
        return invalid("deadline_unix_s must be a unix time or 0")
    weight = submit.tenant_weight or 1.0
    if not 0 < weight < math.inf:
        return invalid("tenant_weight must be greater than 0")
    return JobSpec(
        job_id=submit.job_id,
        prompt=tuple(submit.prompt_token_ids),
        max_tokens=submit.sampling.max_tokens,
        arrival=clock.now(),
        tenant=submit.tenant or "default",
        tenant_weight=weight,
        service_class=service_class,
        priority=submit.priority,
        deadline=clock.from_unix(deadline) if deadline else None,
        min_tokens=max(1, submit.min_output_tokens, submit.sampling.min_tokens),
    )


def rejected(handle: int, rejection: Rejection) -> scheduler_pb2.ServeResponse:
    return scheduler_pb2.ServeResponse(
        rejected=scheduler_pb2.Rejected(
            handle=handle,
            reason=_REASONS[rejection.reason],
            message=rejection.message,
            retry_after_s=rejection.retry_after_s,
        )
    )


def accepted(handle: int) -> scheduler_pb2.ServeResponse:
    return scheduler_pb2.ServeResponse(accepted=scheduler_pb2.Accepted(handle=handle))


class TokenPacker:
    """Packs what one gateway has not got yet into one TokenBatch, and moves `sent` on."""

    def __init__(self) -> None:
        self.message = scheduler_pb2.ServeResponse()
        self._batch = self.message.tokens
        self._room = _MAX_TOKENS

    @property
    def empty(self) -> bool:
        return not self._batch.handles

    def add(self, record: JobRecord) -> bool:
        """Append an entry for `record`. False: something is left over for the next message."""
        if not self._room:
            return False
        batch, first = self._batch, record.sent
        visible = max(record.visible, first)
        last = _run_end(record, first, min(visible, first + self._room))
        complete = last == visible
        ends = complete and record.end_visible and record.end is not None
        if last == first and not ends:
            return complete
        batch.handles.append(record.handle)
        batch.first_indexes.append(first)
        batch.token_counts.append(last - first)
        batch.tokens.extend(record.output[first:last])
        has_logprobs = first in record.logprobs and last > first
        batch.has_logprobs.append(int(has_logprobs))
        if has_logprobs:
            for index in range(first, last):
                chosen, top_ids, top = record.logprobs[index]
                batch.logprobs.append(chosen)
                batch.top_counts.append(len(top_ids))
                batch.top_ids.extend(top_ids)
                batch.top_logprobs.extend(top)
        if first == 0 and last > first and record.job is not None and record.job.cached:
            batch.cached_entries.append(len(batch.handles) - 1)
            batch.cached_tokens.append(record.job.cached)
        if ends and record.end is not None:
            batch.finish_reasons.append(FINISH_TO_WIRE[record.end.reason])
            if record.end.error:
                batch.error_entries.append(len(batch.handles) - 1)
                batch.errors.append(record.end.error)
        else:
            batch.finish_reasons.append(sampling_pb2.FINISH_REASON_UNSPECIFIED)
        record.sent = last
        self._room -= last - first
        return complete


def _run_end(record: JobRecord, first: int, last: int) -> int:
    """End of the run from `first` in which all tokens have log-probabilities, or none has.

    They differ after a change of leader: log-probabilities are not kept in Redis.
    """
    if not record.logprobs:
        return last
    has = first in record.logprobs
    return next((at for at in range(first, last) if (at in record.logprobs) is not has), last)
