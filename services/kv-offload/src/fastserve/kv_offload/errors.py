"""Errors of the sidecar, each with the gRPC status it becomes (service.py).

KvError
├── SlotError        the call makes no sense in the present state; nothing was changed
├── PoolFull         no room for the blocks, or none in time; nothing was changed
│   └── NoFreeSlot   there is room, but no free host slot at this moment
├── BlockMissing     a block that is asked for is not there
├── BlockLost        a copy was damaged or cannot be brought back; its job has been forgotten
├── StaleCall        the epochs of a call are of a past life: attach again
├── NotHere          no such worker
├── JobExists        the job is here already
└── PeerRefused      the other sidecar did not take the blocks, or is not there
"""

from __future__ import annotations


class KvError(Exception):
    """Something that was asked for was not done; the message says why."""


class SlotError(KvError):
    """The call makes no sense in the present state."""


class PoolFull(KvError):
    """No room for the blocks."""


class NoFreeSlot(PoolFull):
    """Room, but no free host slot now."""


class BlockMissing(KvError):
    """A block is not there."""


class BlockLost(KvError):
    """A block's bytes are gone; its job has been forgotten."""


class StaleCall(KvError):
    """A call of a past life."""


class NotHere(KvError):
    """No such worker."""


class JobExists(KvError):
    """The job is here already."""


class PeerRefused(KvError):
    """The other sidecar did not take the blocks."""
