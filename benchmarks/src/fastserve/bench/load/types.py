"""What is asked of a server, and what came of it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request. `due_s`: seconds after the start of the run (ignored in a closed loop).

    prompt_tokens: what the prompt is meant to have, None for a text as it is; max_tokens: the
    length that is asked for.
    """

    due_s: float
    prompt: str
    prompt_tokens: int | None
    max_tokens: int
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """How it went. Times in seconds after the start of the run, nan for what did not happen.

    `due` is when the request was to leave, the origin of all latencies: in an open loop as
    scheduled, in a closed one when it left. `sent` is when the client came to it.
    """

    request: LoadRequest
    due: float
    sent: float
    first: float = math.nan  # the first text came
    last: float = math.nan  # the last text, or the reason why it ended
    end: float = math.nan  # the answer was complete, or known to have failed
    gaps: array[float] = field(default_factory=lambda: array("d"))  # between two events with text
    events: int = 0  # with text
    prompt_tokens: int | None = None  # as the server counts them
    completion_tokens: int | None = None
    error: str | None = None

    @property
    def output_tokens(self) -> int:
        """As the server counts them; where it does not, an event counts for a token."""
        return self.events if self.completion_tokens is None else self.completion_tokens


@dataclass(frozen=True, slots=True)
class ClientHealth:
    """What the client itself added. Seconds; `cpu`: its CPU time over the time of the run."""

    late_p50_s: float
    late_p99_s: float
    late_max_s: float
    stall_p99_s: float  # how late a timer of its own fired, while it ran
    cpu: float


@dataclass(frozen=True, slots=True)
class RunResult:
    """The outcomes of one run; `unfinished` requests were cut off when it was interrupted."""

    outcomes: list[Outcome]
    unfinished: int
    not_sent: int
    client: ClientHealth
