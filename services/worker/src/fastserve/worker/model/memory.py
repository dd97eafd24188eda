"""What weights need, said before they are loaded: who is killed for want of memory says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import torch

from fastserve.common.errors import StartupError
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.parallel.shards import Shard

log = structlog.get_logger(__name__)
_INT8 = 1 + 2 / 32  # bytes: a scale of 16 bits for 32 numbers


def weight_bytes(
    config: ModelConfig, dtype: torch.dtype, *, int8: bool = False, shard: Shard | None = None
) -> int:
    """About what they take in memory. config: of the whole model."""
    own = shard.config(config) if shard else config
    layers = sum(own.layer_weights(layer) for layer in range(own.num_layers))
    rows = len(shard.vocab) if shard else config.vocab_size
    first, last = (shard.first, shard.last) if shard else (True, True)
    ends = first + last - (first and last and config.tie_word_embeddings)
    each = _INT8 if int8 else dtype.itemsize
    return round(layers * each + ends * rows * config.hidden_size * dtype.itemsize)


@contextmanager
def announced(
    config: ModelConfig, dtype: torch.dtype, *, int8: bool = False, shard: Shard | None = None
) -> Iterator[None]:
    """Load weights within. Raises `StartupError` if a GPU has no room for them."""
    mib = weight_bytes(config, dtype, int8=int8, shard=shard) >> 20
    log.info("loading the weights", mib=mib)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StartupError(
            f"the GPU has no room for the weights, about {mib} MiB: more ranks share them "
            "(--tensor-parallel-size, --pipeline-parallel-size)"
        ) from error
