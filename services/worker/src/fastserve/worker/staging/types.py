"""Values and errors of KV staging.

StagingError
├── NoHostSpace     the pool is full; nothing was stored
├── HostCopyLost    the host copy is missing or damaged
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


class SidecarLost(StagingError):
    """The sidecar is gone, and with it what it held."""


@dataclass(frozen=True, slots=True)
class BlockRef:
    """A device block and its place in the job's block table."""

    index: int
    block: int
    valid_tokens: int


@dataclass(frozen=True, slots=True)
class Copied:
    """A copy that was made."""

    tokens: int
    bytes: int
    seconds: float
