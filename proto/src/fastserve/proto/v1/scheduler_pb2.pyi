from fastserve.proto.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RejectReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REJECT_REASON_UNSPECIFIED: _ClassVar[RejectReason]
    REJECT_REASON_QUEUE_FULL: _ClassVar[RejectReason]
    REJECT_REASON_NO_WORKER: _ClassVar[RejectReason]
    REJECT_REASON_DRAINING: _ClassVar[RejectReason]
    REJECT_REASON_TOO_LONG: _ClassVar[RejectReason]
    REJECT_REASON_INVALID: _ClassVar[RejectReason]
    REJECT_REASON_ALREADY_EXISTS: _ClassVar[RejectReason]
    REJECT_REASON_NOT_FOUND: _ClassVar[RejectReason]
    REJECT_REASON_DEADLINE: _ClassVar[RejectReason]
REJECT_REASON_UNSPECIFIED: RejectReason
REJECT_REASON_QUEUE_FULL: RejectReason
REJECT_REASON_NO_WORKER: RejectReason
REJECT_REASON_DRAINING: RejectReason
REJECT_REASON_TOO_LONG: RejectReason
REJECT_REASON_INVALID: RejectReason
REJECT_REASON_ALREADY_EXISTS: RejectReason
REJECT_REASON_NOT_FOUND: RejectReason
REJECT_REASON_DEADLINE: RejectReason

class ServeRequest(_message.Message):
    __slots__ = ("hello", "submit", "cancel", "attach")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submit: Submit
    cancel: Cancel
    attach: Attach
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., attach: _Optional[_Union[Attach, _Mapping]] = ...) -> None: ...

class ServeResponse(_message.Message):
    __slots__ = ("welcome", "accepted", "rejected", "tokens")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    accepted: Accepted
    rejected: Rejected
    tokens: TokenBatch
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., tokens: _Optional[_Union[TokenBatch, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("gateway_id",)
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    def __init__(self, gateway_id: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("epoch", "ready", "model", "max_model_len", "max_job_tokens", "durable", "shard", "live_jobs", "max_num_seqs")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_JOB_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    LIVE_JOBS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    ready: bool
    model: str
    max_model_len: int
    max_job_tokens: int
    durable: bool
    shard: str
    live_jobs: int
    max_num_seqs: int
    def __init__(self, epoch: _Optional[int] = ..., ready: _Optional[bool] = ..., model: _Optional[str] = ..., max_model_len: _Optional[int] = ..., max_job_tokens: _Optional[int] = ..., durable: _Optional[bool] = ..., shard: _Optional[str] = ..., live_jobs: _Optional[int] = ..., max_num_seqs: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("handle", "job_id", "tenant", "service_class", "priority", "prompt_token_ids", "sampling", "traceparent", "deadline_unix_s", "tenant_weight", "min_output_tokens")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SERVICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    TENANT_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    MIN_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    job_id: str
    tenant: str
    service_class: str
    priority: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _sampling_pb2.SamplingParams
    traceparent: str
    deadline_unix_s: float
    tenant_weight: float
    min_output_tokens: int
    def __init__(self, handle: _Optional[int] = ..., job_id: _Optional[str] = ..., tenant: _Optional[str] = ..., service_class: _Optional[str] = ..., priority: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., traceparent: _Optional[str] = ..., deadline_unix_s: _Optional[float] = ..., tenant_weight: _Optional[float] = ..., min_output_tokens: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("handles",)
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handles: _Optional[_Iterable[int]] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("handle", "job_id", "next_index")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    handle: int
    job_id: str
    next_index: int
    def __init__(self, handle: _Optional[int] = ..., job_id: _Optional[str] = ..., next_index: _Optional[int] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("handle", "reason", "message", "retry_after_s")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    handle: int
    reason: RejectReason
    message: str
    retry_after_s: int
    def __init__(self, handle: _Optional[int] = ..., reason: _Optional[_Union[RejectReason, str]] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[int] = ...) -> None: ...

class TokenBatch(_message.Message):
    __slots__ = ("handles", "first_indexes", "token_counts", "finish_reasons", "tokens", "has_logprobs", "logprobs", "top_counts", "top_ids", "top_logprobs", "error_entries", "errors", "cached_entries", "cached_tokens")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEXES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASONS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HAS_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ERROR_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    CACHED_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    first_indexes: _containers.RepeatedScalarFieldContainer[int]
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    finish_reasons: _containers.RepeatedScalarFieldContainer[_sampling_pb2.FinishReason]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    has_logprobs: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_counts: _containers.RepeatedScalarFieldContainer[int]
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    error_entries: _containers.RepeatedScalarFieldContainer[int]
    errors: _containers.RepeatedScalarFieldContainer[str]
    cached_entries: _containers.RepeatedScalarFieldContainer[int]
    cached_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handles: _Optional[_Iterable[int]] = ..., first_indexes: _Optional[_Iterable[int]] = ..., token_counts: _Optional[_Iterable[int]] = ..., finish_reasons: _Optional[_Iterable[_Union[_sampling_pb2.FinishReason, str]]] = ..., tokens: _Optional[_Iterable[int]] = ..., has_logprobs: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., top_counts: _Optional[_Iterable[int]] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ..., error_entries: _Optional[_Iterable[int]] = ..., errors: _Optional[_Iterable[str]] = ..., cached_entries: _Optional[_Iterable[int]] = ..., cached_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("worker_id", "undo")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    undo: bool
    def __init__(self, worker_id: _Optional[str] = ..., undo: _Optional[bool] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("jobs", "others")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    jobs: int
    others: int
    def __init__(self, jobs: _Optional[int] = ..., others: _Optional[int] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("include_jobs",)
    INCLUDE_JOBS_FIELD_NUMBER: _ClassVar[int]
    include_jobs: bool
    def __init__(self, include_jobs: _Optional[bool] = ...) -> None: ...

class SnapshotResponse(_message.Message):
    __slots__ = ("epoch", "policy", "durable", "uptime_s", "level_depths", "level_quanta_s", "workers", "jobs", "counters", "shard")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    LEVEL_DEPTHS_FIELD_NUMBER: _ClassVar[int]
    LEVEL_QUANTA_S_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    policy: str
    durable: bool
    uptime_s: float
    level_depths: _containers.RepeatedScalarFieldContainer[int]
    level_quanta_s: _containers.RepeatedScalarFieldContainer[float]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerState]
    jobs: _containers.RepeatedCompositeFieldContainer[JobState]
    counters: _containers.ScalarMap[str, int]
    shard: str
    def __init__(self, epoch: _Optional[int] = ..., policy: _Optional[str] = ..., durable: _Optional[bool] = ..., uptime_s: _Optional[float] = ..., level_depths: _Optional[_Iterable[int]] = ..., level_quanta_s: _Optional[_Iterable[float]] = ..., workers: _Optional[_Iterable[_Union[WorkerState, _Mapping]]] = ..., jobs: _Optional[_Iterable[_Union[JobState, _Mapping]]] = ..., counters: _Optional[_Mapping[str, int]] = ..., shard: _Optional[str] = ...) -> None: ...

class WorkerState(_message.Message):
    __slots__ = ("address", "worker_id", "connected", "device_blocks", "free_device_blocks", "host_blocks", "free_host_blocks", "block_size", "iterations", "cost_model_error", "decode_s", "prefill_tokens_per_s", "iteration_s", "sampled_tokens", "processed_tokens", "model", "draining", "jobs", "running")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    COST_MODEL_ERROR_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    ITERATION_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROCESSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    address: str
    worker_id: str
    connected: bool
    device_blocks: int
    free_device_blocks: int
    host_blocks: int
    free_host_blocks: int
    block_size: int
    iterations: int
    cost_model_error: float
    decode_s: float
    prefill_tokens_per_s: float
    iteration_s: float
    sampled_tokens: int
    processed_tokens: int
    model: str
    draining: bool
    jobs: int
    running: int
    def __init__(self, address: _Optional[str] = ..., worker_id: _Optional[str] = ..., connected: _Optional[bool] = ..., device_blocks: _Optional[int] = ..., free_device_blocks: _Optional[int] = ..., host_blocks: _Optional[int] = ..., free_host_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., iterations: _Optional[int] = ..., cost_model_error: _Optional[float] = ..., decode_s: _Optional[float] = ..., prefill_tokens_per_s: _Optional[float] = ..., iteration_s: _Optional[float] = ..., sampled_tokens: _Optional[int] = ..., processed_tokens: _Optional[int] = ..., model: _Optional[str] = ..., draining: _Optional[bool] = ..., jobs: _Optional[int] = ..., running: _Optional[int] = ...) -> None: ...

class JobState(_message.Message):
    __slots__ = ("job_id", "tenant", "state", "kv", "level", "prompt_tokens", "output_tokens", "preemptions", "age_s")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    tenant: str
    state: str
    kv: str
    level: int
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    age_s: float
    def __init__(self, job_id: _Optional[str] = ..., tenant: _Optional[str] = ..., state: _Optional[str] = ..., kv: _Optional[str] = ..., level: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., age_s: _Optional[float] = ...) -> None: ...
