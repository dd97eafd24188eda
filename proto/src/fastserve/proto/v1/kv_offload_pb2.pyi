from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class AttachRequest(_message.Message):
    __slots__ = ("worker_id", "worker_epoch", "block_bytes", "block_size", "layout")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    worker_epoch: int
    block_bytes: int
    block_size: int
    layout: str
    def __init__(self, worker_id: _Optional[str] = ..., worker_epoch: _Optional[int] = ..., block_bytes: _Optional[int] = ..., block_size: _Optional[int] = ..., layout: _Optional[str] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("sidecar_epoch", "pool_path", "pool_bytes", "slot_bytes", "slots")
    SIDECAR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    POOL_PATH_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    sidecar_epoch: int
    pool_path: str
    pool_bytes: int
    slot_bytes: int
    slots: int
    def __init__(self, sidecar_epoch: _Optional[int] = ..., pool_path: _Optional[str] = ..., pool_bytes: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., slots: _Optional[int] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("worker_id", "worker_epoch", "sidecar_epoch", "job_id", "block_indexes")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SIDECAR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_INDEXES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    worker_epoch: int
    sidecar_epoch: int
    job_id: str
    block_indexes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, worker_id: _Optional[str] = ..., worker_epoch: _Optional[int] = ..., sidecar_epoch: _Optional[int] = ..., job_id: _Optional[str] = ..., block_indexes: _Optional[_Iterable[int]] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("slots", "free_slots")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    FREE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    free_slots: int
    def __init__(self, slots: _Optional[_Iterable[int]] = ..., free_slots: _Optional[int] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("worker_id", "worker_epoch", "sidecar_epoch", "job_id", "slots", "valid_tokens", "checksums")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SIDECAR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    VALID_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    worker_epoch: int
    sidecar_epoch: int
    job_id: str
    slots: _containers.RepeatedScalarFieldContainer[int]
    valid_tokens: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, worker_id: _Optional[str] = ..., worker_epoch: _Optional[int] = ..., sidecar_epoch: _Optional[int] = ..., job_id: _Optional[str] = ..., slots: _Optional[_Iterable[int]] = ..., valid_tokens: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("free_slots",)
    FREE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    free_slots: int
    def __init__(self, free_slots: _Optional[int] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("worker_id", "worker_epoch", "sidecar_epoch", "job_ids")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SIDECAR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    JOB_IDS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    worker_epoch: int
    sidecar_epoch: int
    job_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_id: _Optional[str] = ..., worker_epoch: _Optional[int] = ..., sidecar_epoch: _Optional[int] = ..., job_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("job_ids", "block_counts", "block_indexes", "slots", "valid_tokens", "checksums")
    JOB_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_INDEXES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    VALID_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    job_ids: _containers.RepeatedScalarFieldContainer[str]
    block_counts: _containers.RepeatedScalarFieldContainer[int]
    block_indexes: _containers.RepeatedScalarFieldContainer[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    valid_tokens: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, job_ids: _Optional[_Iterable[str]] = ..., block_counts: _Optional[_Iterable[int]] = ..., block_indexes: _Optional[_Iterable[int]] = ..., slots: _Optional[_Iterable[int]] = ..., valid_tokens: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("worker_id", "worker_epoch", "sidecar_epoch", "job_ids")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SIDECAR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    JOB_IDS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    worker_epoch: int
    sidecar_epoch: int
    job_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_id: _Optional[str] = ..., worker_epoch: _Optional[int] = ..., sidecar_epoch: _Optional[int] = ..., job_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("freed_slots", "free_slots")
    FREED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    FREE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    freed_slots: int
    free_slots: int
    def __init__(self, freed_slots: _Optional[int] = ..., free_slots: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("sidecar_epoch", "slots", "free_slots", "reserved_slots", "committed_slots", "jobs", "committed_bytes_total", "looked_up_bytes_total", "released_slots_total", "rejected_reservations_total")
    SIDECAR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    FREE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LOOKED_UP_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    RELEASED_SLOTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    REJECTED_RESERVATIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    sidecar_epoch: int
    slots: int
    free_slots: int
    reserved_slots: int
    committed_slots: int
    jobs: int
    committed_bytes_total: int
    looked_up_bytes_total: int
    released_slots_total: int
    rejected_reservations_total: int
    def __init__(self, sidecar_epoch: _Optional[int] = ..., slots: _Optional[int] = ..., free_slots: _Optional[int] = ..., reserved_slots: _Optional[int] = ..., committed_slots: _Optional[int] = ..., jobs: _Optional[int] = ..., committed_bytes_total: _Optional[int] = ..., looked_up_bytes_total: _Optional[int] = ..., released_slots_total: _Optional[int] = ..., rejected_reservations_total: _Optional[int] = ...) -> None: ...
