"""Values and errors of KV staging.

StagingError
├── NoHostSpace     the pool is full; nothing was stored
├── HostCopyLost    the host copy is missing or damaged
├── NotSent         the sidecar of another worker group did not take a job
└── SidecarLost     the sidecar is not reachable, or restarted and forgot everything
"""

from __future__ import annotations

from dataclasses import dataclass


class StagingError(Exception):
    """A copy between device and host did not happen."""


class NoHostSpace(StagingError):
    """The host pool is full."""


class HostCopyLost(StagingError):
    """The host copy is missing or damaged: recompute."""


class NotSent(StagingError):
    """Another worker group has nothing of the job, as far as is known."""


class SidecarLost(StagingError):
    """The sidecar is gone, and with it what it held."""


@dataclass(frozen=True, slots=True)
class BlockRef:
    """A device block and its place in the job's block table."""

    index: int
    block: int
    valid_tokens: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker group takes KV: its id, and the address of each rank's sidecar for peers."""

    worker_id: str
    peers: tuple[str, ...]

    def of(self, rank: int) -> tuple[str, str]:
        """The address for a rank's slice, and the name of its pool there."""
        name = rank_name(self.worker_id, rank) if len(self.peers) > 1 else self.worker_id
        return self.peers[rank], name


def rank_name(worker_id: str, rank: int) -> str:
    """Each rank of a group has a pool for its slice."""
    return f"{worker_id}/{rank}"


@dataclass(frozen=True, slots=True)
class Copied:
    """A copy that was made."""

    tokens: int
    bytes: int
    seconds: float
