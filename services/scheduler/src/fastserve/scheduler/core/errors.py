"""Exceptions of the core.

CoreError
 ├── UnknownPolicyError   no policy of that name
 ├── ProtocolError        a worker said what it cannot have seen; the stream is not to be trusted
 └── IntegrityError       the core contradicts itself: a bug
"""

from __future__ import annotations


class CoreError(Exception):
    """Any error of the scheduler's core."""


class UnknownPolicyError(CoreError, ValueError):
    """No policy of that name."""


class ProtocolError(CoreError):
    """A worker said what it cannot have seen: end its stream and open it anew."""


class IntegrityError(CoreError):
    """The core contradicts itself: a bug."""
