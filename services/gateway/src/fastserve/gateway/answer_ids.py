"""Ids of answers, `<prefix>-<32 hexadecimal digits>-<shard>`: every gateway finds their shard."""

from __future__ import annotations

import re
import uuid
from typing import Final

SHARD: Final = r"[A-Za-z0-9._-]{1,64}"
_ANSWER: Final = re.compile(rf"[a-z]{{4,10}}-[0-9a-f]{{32}}-({SHARD})")


def new_answer_id(prefix: str, shard: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}-{shard}"


def shard_of(response_id: str) -> str | None:
    """The shard that has the answer; None if this is no id of an answer."""
    match = _ANSWER.fullmatch(response_id)
    return match[1] if match is not None else None
