from fastserve.proto.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvOp(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_OP_UNSPECIFIED: _ClassVar[KvOp]
    KV_OP_OFFLOAD: _ClassVar[KvOp]
    KV_OP_UPLOAD: _ClassVar[KvOp]
    KV_OP_DROP_DEVICE: _ClassVar[KvOp]
    KV_OP_DROP_HOST: _ClassVar[KvOp]
    KV_OP_RELEASE: _ClassVar[KvOp]
    KV_OP_COPY_OUT: _ClassVar[KvOp]
    KV_OP_EXPORT: _ClassVar[KvOp]

class KvStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_STATUS_UNSPECIFIED: _ClassVar[KvStatus]
    KV_STATUS_OK: _ClassVar[KvStatus]
    KV_STATUS_NO_HOST_SPACE: _ClassVar[KvStatus]
    KV_STATUS_NO_DEVICE_SPACE: _ClassVar[KvStatus]
    KV_STATUS_LOST: _ClassVar[KvStatus]
    KV_STATUS_NOT_SENT: _ClassVar[KvStatus]
KV_OP_UNSPECIFIED: KvOp
KV_OP_OFFLOAD: KvOp
KV_OP_UPLOAD: KvOp
KV_OP_DROP_DEVICE: KvOp
KV_OP_DROP_HOST: KvOp
KV_OP_RELEASE: KvOp
KV_OP_COPY_OUT: KvOp
KV_OP_EXPORT: KvOp
KV_STATUS_UNSPECIFIED: KvStatus
KV_STATUS_OK: KvStatus
KV_STATUS_NO_HOST_SPACE: KvStatus
KV_STATUS_NO_DEVICE_SPACE: KvStatus
KV_STATUS_LOST: KvStatus
KV_STATUS_NOT_SENT: KvStatus

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("worker_id", "epoch", "model", "dtype", "device", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "block_bytes", "device_blocks", "host_blocks", "tensor_parallel_size", "pipeline_parallel_size", "vocab_size", "eos_token_ids", "prefill_cost", "decode_cost", "draining")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_COST_FIELD_NUMBER: _ClassVar[int]
    DECODE_COST_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    model: str
    dtype: str
    device: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    block_bytes: int
    device_blocks: int
    host_blocks: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    prefill_cost: CostSample
    decode_cost: CostSample
    draining: bool
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., model: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., block_size: _Optional[int] = ..., block_bytes: _Optional[int] = ..., device_blocks: _Optional[int] = ..., host_blocks: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ..., pipeline_parallel_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., prefill_cost: _Optional[_Union[CostSample, _Mapping]] = ..., decode_cost: _Optional[_Union[CostSample, _Mapping]] = ..., draining: _Optional[bool] = ...) -> None: ...

class CostSample(_message.Message):
    __slots__ = ("rows", "new_tokens", "context_tokens", "seconds")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    new_tokens: int
    context_tokens: int
    seconds: float
    def __init__(self, rows: _Optional[int] = ..., new_tokens: _Optional[int] = ..., context_tokens: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class RunResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: IterationReport
    def __init__(self, report: _Optional[_Union[IterationReport, _Mapping]] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("plan_id", "scheduler_epoch", "reset", "lease", "new_jobs", "row_handles", "row_tokens", "op_ids", "ops", "op_handles", "shard", "op_blocks", "export_to", "drain", "may_leave")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    NEW_JOBS_FIELD_NUMBER: _ClassVar[int]
    ROW_HANDLES_FIELD_NUMBER: _ClassVar[int]
    ROW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OP_IDS_FIELD_NUMBER: _ClassVar[int]
    OPS_FIELD_NUMBER: _ClassVar[int]
    OP_HANDLES_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    OP_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EXPORT_TO_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    MAY_LEAVE_FIELD_NUMBER: _ClassVar[int]
    plan_id: int
    scheduler_epoch: int
    reset: bool
    lease: int
    new_jobs: _containers.RepeatedCompositeFieldContainer[Job]
    row_handles: _containers.RepeatedScalarFieldContainer[int]
    row_tokens: _containers.RepeatedScalarFieldContainer[int]
    op_ids: _containers.RepeatedScalarFieldContainer[int]
    ops: _containers.RepeatedScalarFieldContainer[KvOp]
    op_handles: _containers.RepeatedScalarFieldContainer[int]
    shard: str
    op_blocks: _containers.RepeatedScalarFieldContainer[int]
    export_to: _containers.RepeatedCompositeFieldContainer[KvPlace]
    drain: bool
    may_leave: bool
    def __init__(self, plan_id: _Optional[int] = ..., scheduler_epoch: _Optional[int] = ..., reset: _Optional[bool] = ..., lease: _Optional[int] = ..., new_jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., row_handles: _Optional[_Iterable[int]] = ..., row_tokens: _Optional[_Iterable[int]] = ..., op_ids: _Optional[_Iterable[int]] = ..., ops: _Optional[_Iterable[_Union[KvOp, str]]] = ..., op_handles: _Optional[_Iterable[int]] = ..., shard: _Optional[str] = ..., op_blocks: _Optional[_Iterable[int]] = ..., export_to: _Optional[_Iterable[_Union[KvPlace, _Mapping]]] = ..., drain: _Optional[bool] = ..., may_leave: _Optional[bool] = ...) -> None: ...

class KvPlace(_message.Message):
    __slots__ = ("worker_id", "layout", "peers")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    layout: str
    peers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_id: _Optional[str] = ..., layout: _Optional[str] = ..., peers: _Optional[_Iterable[str]] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("handle", "job_id", "token_ids", "prompt_len", "sampling", "traceparent", "cache_salt", "imported_tokens")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    IMPORTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    job_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_len: int
    sampling: _sampling_pb2.SamplingParams
    traceparent: str
    cache_salt: bytes
    imported_tokens: int
    def __init__(self, handle: _Optional[int] = ..., job_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_len: _Optional[int] = ..., sampling: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., traceparent: _Optional[str] = ..., cache_salt: _Optional[bytes] = ..., imported_tokens: _Optional[int] = ...) -> None: ...

class IterationReport(_message.Message):
    __slots__ = ("worker_epoch", "plan_id", "iteration", "row_handles", "row_new_tokens", "row_computed", "sampled_handles", "sampled_indexes", "sampled_tokens", "finish_reasons", "has_logprobs", "logprobs", "top_counts", "top_ids", "top_logprobs", "stalled_handles", "done_op_ids", "done_status", "done_tokens", "done_bytes", "done_seconds", "free_device_blocks", "free_host_blocks", "started_unix_s", "seconds", "context_tokens", "failed_handles", "failures", "inventory", "cached_handles", "cached_tokens", "draining", "place")
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    ITERATION_FIELD_NUMBER: _ClassVar[int]
    ROW_HANDLES_FIELD_NUMBER: _ClassVar[int]
    ROW_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROW_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_HANDLES_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_INDEXES_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASONS_FIELD_NUMBER: _ClassVar[int]
    HAS_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STALLED_HANDLES_FIELD_NUMBER: _ClassVar[int]
    DONE_OP_IDS_FIELD_NUMBER: _ClassVar[int]
    DONE_STATUS_FIELD_NUMBER: _ClassVar[int]
    DONE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DONE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FREE_DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FAILED_HANDLES_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    INVENTORY_FIELD_NUMBER: _ClassVar[int]
    CACHED_HANDLES_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    worker_epoch: int
    plan_id: int
    iteration: int
    row_handles: _containers.RepeatedScalarFieldContainer[int]
    row_new_tokens: _containers.RepeatedScalarFieldContainer[int]
    row_computed: _containers.RepeatedScalarFieldContainer[int]
    sampled_handles: _containers.RepeatedScalarFieldContainer[int]
    sampled_indexes: _containers.RepeatedScalarFieldContainer[int]
    sampled_tokens: _containers.RepeatedScalarFieldContainer[int]
    finish_reasons: _containers.RepeatedScalarFieldContainer[_sampling_pb2.FinishReason]
    has_logprobs: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_counts: _containers.RepeatedScalarFieldContainer[int]
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    stalled_handles: _containers.RepeatedScalarFieldContainer[int]
    done_op_ids: _containers.RepeatedScalarFieldContainer[int]
    done_status: _containers.RepeatedScalarFieldContainer[KvStatus]
    done_tokens: _containers.RepeatedScalarFieldContainer[int]
    done_bytes: _containers.RepeatedScalarFieldContainer[int]
    done_seconds: _containers.RepeatedScalarFieldContainer[float]
    free_device_blocks: int
    free_host_blocks: int
    started_unix_s: float
    seconds: float
    context_tokens: int
    failed_handles: _containers.RepeatedScalarFieldContainer[int]
    failures: _containers.RepeatedScalarFieldContainer[str]
    inventory: Inventory
    cached_handles: _containers.RepeatedScalarFieldContainer[int]
    cached_tokens: _containers.RepeatedScalarFieldContainer[int]
    draining: bool
    place: KvPlace
    def __init__(self, worker_epoch: _Optional[int] = ..., plan_id: _Optional[int] = ..., iteration: _Optional[int] = ..., row_handles: _Optional[_Iterable[int]] = ..., row_new_tokens: _Optional[_Iterable[int]] = ..., row_computed: _Optional[_Iterable[int]] = ..., sampled_handles: _Optional[_Iterable[int]] = ..., sampled_indexes: _Optional[_Iterable[int]] = ..., sampled_tokens: _Optional[_Iterable[int]] = ..., finish_reasons: _Optional[_Iterable[_Union[_sampling_pb2.FinishReason, str]]] = ..., has_logprobs: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., top_counts: _Optional[_Iterable[int]] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ..., stalled_handles: _Optional[_Iterable[int]] = ..., done_op_ids: _Optional[_Iterable[int]] = ..., done_status: _Optional[_Iterable[_Union[KvStatus, str]]] = ..., done_tokens: _Optional[_Iterable[int]] = ..., done_bytes: _Optional[_Iterable[int]] = ..., done_seconds: _Optional[_Iterable[float]] = ..., free_device_blocks: _Optional[int] = ..., free_host_blocks: _Optional[int] = ..., started_unix_s: _Optional[float] = ..., seconds: _Optional[float] = ..., context_tokens: _Optional[int] = ..., failed_handles: _Optional[_Iterable[int]] = ..., failures: _Optional[_Iterable[str]] = ..., inventory: _Optional[_Union[Inventory, _Mapping]] = ..., cached_handles: _Optional[_Iterable[int]] = ..., cached_tokens: _Optional[_Iterable[int]] = ..., draining: _Optional[bool] = ..., place: _Optional[_Union[KvPlace, _Mapping]] = ...) -> None: ...

class Inventory(_message.Message):
    __slots__ = ("job_ids", "device_tokens", "host_tokens", "place")
    JOB_IDS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    job_ids: _containers.RepeatedScalarFieldContainer[str]
    device_tokens: _containers.RepeatedScalarFieldContainer[int]
    host_tokens: _containers.RepeatedScalarFieldContainer[int]
    place: KvPlace
    def __init__(self, job_ids: _Optional[_Iterable[str]] = ..., device_tokens: _Optional[_Iterable[int]] = ..., host_tokens: _Optional[_Iterable[int]] = ..., place: _Optional[_Union[KvPlace, _Mapping]] = ...) -> None: ...
