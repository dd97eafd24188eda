"""Perplexity of a model on a text: what reduced precision costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from fastserve.worker.model.batch import Batch
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.kv_cache import KvCache

_CHUNK = 256  # tokens whose logits are held at a time


class Scored(Protocol):
    """A model as this module needs it."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device

    def forward(self, batch: Batch, kv: KvCache) -> torch.Tensor: ...


def perplexity(model: Scored, tokens: Sequence[int], window: int = 512) -> float:
    """exp of the mean surprise at tokens[i] after what stands before it in its window.

    The text is cut into windows of `window` tokens that know nothing of each other.
    """
    size = 16
    kv = KvCache(model.config, -(-window // size), size, model.dtype, model.device)
    table = list(range(kv.num_blocks))
    total, count = 0.0, 0
    for start in range(0, len(tokens), window):
        part = list(tokens[start : start + window])
        for first in range(0, len(part), _CHUNK):
            chunk = part[first : first + _CHUNK]
            # Rows of one token each, on the same blocks: so that every position gives its logits.
            batch = Batch(
                token_ids=chunk,
                query_lens=[1] * len(chunk),
                context_lens=[first + i + 1 for i in range(len(chunk))],
                block_tables=[table] * len(chunk),
                logit_rows=list(range(len(chunk))),
            )
            logprobs = model.forward(batch, kv).log_softmax(dim=-1)
            targets = torch.tensor(part[first + 1 : first + 1 + len(chunk)])
            found = logprobs[: len(targets)].gather(1, targets[:, None])
            total -= float(found.double().sum())
            count += len(targets)
    return math.exp(total / count)
