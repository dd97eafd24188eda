"""KV staging: blocks of jobs to the kv-offload sidecar and back."""

from fastserve.worker.staging.client import KvStaging
from fastserve.worker.staging.types import (
    BlockRef,
    Copied,
    HostCopyLost,
    NoHostSpace,
    NotSent,
    Place,
    SidecarLost,
    StagingError,
)

__all__ = [
    "BlockRef",
    "Copied",
    "HostCopyLost",
    "KvStaging",
    "NoHostSpace",
    "NotSent",
    "Place",
    "SidecarLost",
    "StagingError",
]
