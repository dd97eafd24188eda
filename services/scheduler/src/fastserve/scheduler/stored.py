"""What Redis holds of a job, and how it is written there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from google.protobuf import json_format

from fastserve.proto.v1.sampling_pb2 import SamplingParams

# Of the hash of a job (lua/write.lua).
FIELDS: Final = (
    *(
        "tenant",
        "tenant_weight",
        "min_output_tokens",
        "service_class",
        "priority",
        "arrival_unix_s",
        "deadline_unix_s",
        "traceparent",
    ),
    *("sampling", "prompt", "level", "order", "attained_s", "preemptions", "state"),
    *("finish_reason", "error"),
)


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A job as Redis holds it. Times are unix seconds; `finish_reason` "" while it lives."""

    job_id: str
    tenant: str
    tenant_weight: float
    service_class: str
    priority: int
    arrival_unix_s: float
    deadline_unix_s: float  # 0: none
    min_output_tokens: int
    traceparent: str
    prompt: Sequence[int]
    sampling: SamplingParams
    level: int
    order: int  # place within the level
    attained_s: float
    preemptions: int
    state: str
    output: Sequence[int]
    finish_reason: str = ""
    error: str = ""


class Placement(NamedTuple):
    """Where a job stands among the others."""

    job_id: str
    level: int
    order: int
    attained_s: float
    preemptions: int
    state: str


@dataclass(slots=True)
class Batch:
    """Changes to be written together. A job is in `whole` or in the others, `ended` apart."""

    whole: list[StoredJob] = field(default_factory=list)
    appended: list[tuple[str, Sequence[int]]] = field(default_factory=list)
    placed: list[Placement] = field(default_factory=list)
    ended: list[tuple[str, str, str, str]] = field(default_factory=list)  # id, state, reason, error
    forgotten: list[str] = field(default_factory=list)
    workers: dict[str, str] = field(default_factory=dict)  # id -> JSON, for people only


def _tokens(tokens: Iterable[int]) -> str:
    """Comma after every token, so that logs grow by appending."""
    return "".join([f"{token}," for token in tokens])


def _parse_tokens(text: str) -> list[int]:
    tokens: list[int] = json.loads(f"[{text[:-1]}]")  # half the time of int() for each
    return tokens


def _parse_sampling(text: str) -> SamplingParams:
    """As `json_format.Parse`, in a tenth of the time."""
    values = json.loads(text)
    return SamplingParams(**{**values, "seed": int(values.get("seed", 0))})  # 64 bits: a string


def encode(batch: Batch) -> list[Any]:
    """Arguments 6 and up of write.lua."""
    appended = "".join([f"{job_id} {_tokens(new)}\n" for job_id, new in batch.appended])
    placed = "".join(
        [
            f"{at.job_id} {at.level} {at.order} {at.attained_s!r} {at.preemptions} {at.state}\n"
            for at in batch.placed
        ]
    )
    args: list[Any] = [appended, placed, len(batch.whole)]
    for job in batch.whole:
        fields = _fields(job)
        args += [job.job_id, job.level, job.order, _tokens(job.output), len(fields), *fields]
    args.append(len(batch.ended))
    for ended in batch.ended:
        args += ended
    args += [len(batch.forgotten), *batch.forgotten, len(batch.workers)]
    for worker in batch.workers.items():
        args += worker
    return args


def _fields(job: StoredJob) -> list[Any]:
    sampling = json_format.MessageToJson(
        job.sampling, preserving_proto_field_name=True, indent=None
    )
    return [
        *("tenant", job.tenant, "tenant_weight", repr(job.tenant_weight)),
        *("min_output_tokens", job.min_output_tokens),
        *("service_class", job.service_class, "priority", job.priority),
        *("arrival_unix_s", repr(job.arrival_unix_s)),
        *("deadline_unix_s", repr(job.deadline_unix_s)),
        *("traceparent", job.traceparent, "sampling", sampling, "prompt", _tokens(job.prompt)),
        *("attained_s", repr(job.attained_s), "preemptions", job.preemptions),
        *("state", job.state, "finish_reason", job.finish_reason, "error", job.error),
    ]


def decode(job_id: str, fields: Mapping[str, str], log: str) -> StoredJob:
    """From values of `FIELDS` and the log. Raises TypeError or ValueError if they make no job."""
    return StoredJob(
        job_id=job_id,
        tenant=fields["tenant"],
        # Not written by earlier versions.
        tenant_weight=float(fields["tenant_weight"] or 1.0),
        min_output_tokens=int(fields["min_output_tokens"] or 1),
        service_class=fields["service_class"],
        priority=int(fields["priority"]),
        arrival_unix_s=float(fields["arrival_unix_s"]),
        deadline_unix_s=float(fields["deadline_unix_s"]),
        traceparent=fields["traceparent"],
        prompt=_parse_tokens(fields["prompt"]),
        sampling=_parse_sampling(fields["sampling"]),
        level=int(fields["level"]),
        order=int(fields["order"]),
        attained_s=float(fields["attained_s"]),
        preemptions=int(fields["preemptions"]),
        state=fields["state"],
        output=_parse_tokens(log),
        finish_reason=fields["finish_reason"],
        error=fields["error"],
    )
