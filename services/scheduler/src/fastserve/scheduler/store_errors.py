"""What can go wrong with Redis, and what an operator does about it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
)
from redis.exceptions import ConnectionError as RedisConnectionError


class Trouble(StrEnum):
    """Label `kind` of `fastserve_redis_errors_total`."""

    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    SLOW = "slow"  # it did answer
    PASSWORD = "password"
    OUT_OF_MEMORY = "out_of_memory"
    READ_ONLY = "read_only"
    LOST_DATA = "lost_data"
    FENCED = "fenced"
    REFUSED = "refused"


ADVICE: Final[Mapping[Trouble, str]] = {
    Trouble.UNREACHABLE: "check that Redis runs and that --redis-url names it",
    Trouble.TIMEOUT: "look at the load of Redis and the network to it, or raise --redis-timeout",
    Trouble.SLOW: "answers wait for Redis: look at its load, its disk and the network to it",
    Trouble.PASSWORD: "correct the user and password in --redis-url, or the rights of that user",
    Trouble.OUT_OF_MEMORY: "raise maxmemory of Redis; maxmemory-policy must be noeviction",
    Trouble.READ_ONLY: "--redis-url names a replica: give it the primary",
    Trouble.LOST_DATA: "nothing to do if Redis was restarted; else see that it evicts nothing",
    Trouble.FENCED: "nothing to do: another scheduler leads this shard",
    Trouble.REFUSED: "see what Redis says in its own log",
}


class StoreError(Exception):
    """Root of what can go wrong with Redis.

    StoreError
    ├── StoreUnreachable   it does not answer, or not in time, or refuses to work
    ├── StoreLost          it answers, but does not hold what it once confirmed
    └── FencedError        a newer leader took over: stop
    """

    trouble = Trouble.REFUSED


class StoreUnreachable(StoreError):
    """Redis does not answer, or not in time, or refuses commands: `trouble` says which."""

    def __init__(self, message: str, trouble: Trouble) -> None:
        super().__init__(message)
        self.trouble = trouble


class StoreLost(StoreError):
    """Redis came back without (all of) what it had confirmed."""

    trouble = Trouble.LOST_DATA


class FencedError(StoreError):
    """Another scheduler leads this shard now; nothing was written."""

    trouble = Trouble.FENCED


def store_error(error: RedisError) -> StoreError:
    """What an error of the client, or a reply of the scripts, means here."""
    message = str(error)
    if message.startswith("FENCED"):
        return FencedError(message)
    if message.startswith("LOST"):
        return StoreLost(message)
    return StoreUnreachable(f"{type(error).__name__}: {message}", _trouble(error))


def _trouble(error: RedisError) -> Trouble:
    # What goes wrong while the client connects comes wrapped in a ConnectionError.
    match error.__cause__ or error:
        case OutOfMemoryError():
            return Trouble.OUT_OF_MEMORY
        case AuthenticationError() | NoPermissionError():
            return Trouble.PASSWORD
        case ReadOnlyError():
            return Trouble.READ_ONLY
        case RedisConnectionError():  # the root of some of the others
            return Trouble.UNREACHABLE
    return Trouble.REFUSED
