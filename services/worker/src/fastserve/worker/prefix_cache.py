"""What a full KV block holds, as a key: a hash over all tokens up to its end and who may share it.

Tokens come from users who must not see, or guess by the time that an answer takes, what others
wrote. So the hash is cryptographic, keyed with a secret of this process, and 128 bits long: nobody
can make two prompts with the same keys. It takes about a microsecond per block.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Iterator
from hashlib import blake2b

from fastserve.worker.job import Job

_BYTES = 16


class BlockKeys:
    """Makes the keys of jobs' blocks of `block_size` tokens."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._secret = secrets.token_bytes(blake2b.MAX_KEY_SIZE)

    def of(self, job: Job, first: int, end: int) -> Iterator[bytes]:
        """Keys of the blocks `first` .. `end`-1 of a job, whose tokens are known. They stay with
        it; those of the blocks before `first` are there already."""
        keys, size = job.keys, self._block_size
        for index in range(first, end):
            if index == len(keys):
                before = keys[-1] if keys else self._hash(job.salt)
                tokens = array("I", job.tokens[index * size : (index + 1) * size])
                keys.append(self._hash(before + tokens.tobytes()))
            yield keys[index]

    def _hash(self, content: bytes) -> bytes:
        return blake2b(content, digest_size=_BYTES, key=self._secret).digest()
