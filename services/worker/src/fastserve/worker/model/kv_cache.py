"""The KV cache on the device: pages of `block_size` tokens."""

from __future__ import annotations

import math
import mmap

import torch

from fastserve.worker.model.config import ModelConfig


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: K and V of `block_size` tokens in all layers."""
    per_token = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    return per_token * block_size * dtype.itemsize


class KvCache:
    """`data[block, layer, K or V, kv head, token in block, head_dim]`.

    The block is the outermost dimension, so one block of one job is one contiguous piece of
    memory for all layers: moving it to the host or back is a single copy.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (
            num_blocks,
            config.num_layers,
            2,
            config.num_kv_heads,
            block_size,
            config.head_dim,
        )
        # Zeros, not empty: masked positions are read (with weight 0), and 0 * NaN is NaN.
        self.data = _zeros(shape, dtype, device)
        self.block_bytes = block_bytes(config, block_size, dtype)

    def as_bytes(self) -> torch.Tensor:
        """uint8 view [num_blocks, block_bytes] of the same memory."""
        return self.data.view(self.num_blocks, -1).view(torch.uint8)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # A layer's pages lie a block apart: with pages of 4 KiB every one would miss the TLB.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
