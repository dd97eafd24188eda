from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

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
    __slots__ = ("sidecar_epoch", "pool_path", "pool_bytes", "slot_bytes", "slots", "capacity_blocks", "free_blocks", "verify", "owner_lease_seconds", "peer_address")
    SIDECAR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    POOL_PATH_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    OWNER_LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    sidecar_epoch: int
    pool_path: str
    pool_bytes: int
    slot_bytes: int
    slots: int
    capacity_blocks: int
    free_blocks: int
    verify: bool
    owner_lease_seconds: float
    peer_address: str
    def __init__(self, sidecar_epoch: _Optional[int] = ..., pool_path: _Optional[str] = ..., pool_bytes: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., slots: _Optional[int] = ..., capacity_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., verify: _Optional[bool] = ..., owner_lease_seconds: _Optional[float] = ..., peer_address: _Optional[str] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("worker_id", "worker_epoch", "sidecar_epoch")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SIDECAR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    worker_epoch: int
    sidecar_epoch: int
    def __init__(self, worker_id: _Optional[str] = ..., worker_epoch: _Optional[int] = ..., sidecar_epoch: _Optional[int] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("free_blocks",)
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    free_blocks: int
    def __init__(self, free_blocks: _Optional[int] = ...) -> None: ...

class DetachRequest(_message.Message):
    __slots__ = ("worker_id", "worker_epoch", "sidecar_epoch")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SIDECAR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    worker_epoch: int
    sidecar_epoch: int
    def __init__(self, worker_id: _Optional[str] = ..., worker_epoch: _Optional[int] = ..., sidecar_epoch: _Optional[int] = ...) -> None: ...

class DetachResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("worker_id", "worker_epoch", "sidecar_epoch", "job_id", "block_indexes", "cache_blocks")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SIDECAR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_INDEXES_FIELD_NUMBER: _ClassVar[int]
    CACHE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    worker_epoch: int
    sidecar_epoch: int
    job_id: str
    block_indexes: _containers.RepeatedScalarFieldContainer[int]
    cache_blocks: int
    def __init__(self, worker_id: _Optional[str] = ..., worker_epoch: _Optional[int] = ..., sidecar_epoch: _Optional[int] = ..., job_id: _Optional[str] = ..., block_indexes: _Optional[_Iterable[int]] = ..., cache_blocks: _Optional[int] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("slots", "free_slots")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    FREE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    free_slots: int
    def __init__(self, slots: _Optional[_Iterable[int]] = ..., free_slots: _Optional[int] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("worker_id", "worker_epoch", "sidecar_epoch", "job_id", "slots", "valid_tokens", "checksums", "keys")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SIDECAR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    VALID_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    worker_epoch: int
    sidecar_epoch: int
    job_id: str
    slots: _containers.RepeatedScalarFieldContainer[int]
    valid_tokens: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, worker_id: _Optional[str] = ..., worker_epoch: _Optional[int] = ..., sidecar_epoch: _Optional[int] = ..., job_id: _Optional[str] = ..., slots: _Optional[_Iterable[int]] = ..., valid_tokens: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("free_slots", "cached_blocks")
    FREE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    free_slots: int
    cached_blocks: int
    def __init__(self, free_slots: _Optional[int] = ..., cached_blocks: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("job_ids", "block_counts", "block_indexes", "slots", "valid_tokens", "checksums", "on_disk")
    JOB_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_INDEXES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    VALID_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    ON_DISK_FIELD_NUMBER: _ClassVar[int]
    job_ids: _containers.RepeatedScalarFieldContainer[str]
    block_counts: _containers.RepeatedScalarFieldContainer[int]
    block_indexes: _containers.RepeatedScalarFieldContainer[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    valid_tokens: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    on_disk: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, job_ids: _Optional[_Iterable[str]] = ..., block_counts: _Optional[_Iterable[int]] = ..., block_indexes: _Optional[_Iterable[int]] = ..., slots: _Optional[_Iterable[int]] = ..., valid_tokens: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ..., on_disk: _Optional[_Iterable[int]] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("worker_id", "worker_epoch", "sidecar_epoch", "job_id", "block_indexes", "damaged", "keys")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SIDECAR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_INDEXES_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    worker_epoch: int
    sidecar_epoch: int
    job_id: str
    block_indexes: _containers.RepeatedScalarFieldContainer[int]
    damaged: bool
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, worker_id: _Optional[str] = ..., worker_epoch: _Optional[int] = ..., sidecar_epoch: _Optional[int] = ..., job_id: _Optional[str] = ..., block_indexes: _Optional[_Iterable[int]] = ..., damaged: _Optional[bool] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReadResponse(_message.Message):
    __slots__ = ("block_indexes", "slots", "valid_tokens", "checksums")
    BLOCK_INDEXES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    VALID_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    block_indexes: _containers.RepeatedScalarFieldContainer[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    valid_tokens: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, block_indexes: _Optional[_Iterable[int]] = ..., slots: _Optional[_Iterable[int]] = ..., valid_tokens: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

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

class ExportRequest(_message.Message):
    __slots__ = ("worker_id", "worker_epoch", "sidecar_epoch", "job_ids", "peer", "to_worker_id")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SIDECAR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    JOB_IDS_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    TO_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    worker_epoch: int
    sidecar_epoch: int
    job_ids: _containers.RepeatedScalarFieldContainer[str]
    peer: str
    to_worker_id: str
    def __init__(self, worker_id: _Optional[str] = ..., worker_epoch: _Optional[int] = ..., sidecar_epoch: _Optional[int] = ..., job_ids: _Optional[_Iterable[str]] = ..., peer: _Optional[str] = ..., to_worker_id: _Optional[str] = ...) -> None: ...

class ExportResponse(_message.Message):
    __slots__ = ("blocks", "bytes")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class ImportRequest(_message.Message):
    __slots__ = ("header", "piece")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    header: ImportHeader
    piece: BlockPiece
    def __init__(self, header: _Optional[_Union[ImportHeader, _Mapping]] = ..., piece: _Optional[_Union[BlockPiece, _Mapping]] = ...) -> None: ...

class ImportHeader(_message.Message):
    __slots__ = ("to_worker_id", "job_id", "block_bytes", "block_size", "layout", "block_indexes", "valid_tokens", "checksums")
    TO_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_INDEXES_FIELD_NUMBER: _ClassVar[int]
    VALID_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    to_worker_id: str
    job_id: str
    block_bytes: int
    block_size: int
    layout: str
    block_indexes: _containers.RepeatedScalarFieldContainer[int]
    valid_tokens: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, to_worker_id: _Optional[str] = ..., job_id: _Optional[str] = ..., block_bytes: _Optional[int] = ..., block_size: _Optional[int] = ..., layout: _Optional[str] = ..., block_indexes: _Optional[_Iterable[int]] = ..., valid_tokens: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class BlockPiece(_message.Message):
    __slots__ = ("block_index", "offset", "data")
    BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    block_index: int
    offset: int
    data: bytes
    def __init__(self, block_index: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ImportResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("sidecar_epoch", "slots", "free_slots", "reserved_slots", "committed_slots", "jobs", "committed_bytes_total", "looked_up_bytes_total", "released_slots_total", "rejected_reservations_total", "disk_slots", "free_disk_slots", "disk_blocks", "owners", "spilled_blocks_total", "fetched_blocks_total", "cached_blocks")
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
    DISK_SLOTS_FIELD_NUMBER: _ClassVar[int]
    FREE_DISK_SLOTS_FIELD_NUMBER: _ClassVar[int]
    DISK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    SPILLED_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
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
    disk_slots: int
    free_disk_slots: int
    disk_blocks: int
    owners: int
    spilled_blocks_total: int
    fetched_blocks_total: int
    cached_blocks: int
    def __init__(self, sidecar_epoch: _Optional[int] = ..., slots: _Optional[int] = ..., free_slots: _Optional[int] = ..., reserved_slots: _Optional[int] = ..., committed_slots: _Optional[int] = ..., jobs: _Optional[int] = ..., committed_bytes_total: _Optional[int] = ..., looked_up_bytes_total: _Optional[int] = ..., released_slots_total: _Optional[int] = ..., rejected_reservations_total: _Optional[int] = ..., disk_slots: _Optional[int] = ..., free_disk_slots: _Optional[int] = ..., disk_blocks: _Optional[int] = ..., owners: _Optional[int] = ..., spilled_blocks_total: _Optional[int] = ..., fetched_blocks_total: _Optional[int] = ..., cached_blocks: _Optional[int] = ...) -> None: ...
