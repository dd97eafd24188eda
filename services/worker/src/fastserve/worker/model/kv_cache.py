"""The KV cache on the device: pages of `block_size` tokens."""

from __future__ import annotations

import contextlib
import mmap

import torch

from fastserve.worker.model.config import ModelConfig


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: K and V of `block_size` tokens in all layers."""
    per_token = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    return per_token * block_size * dtype.itemsize


def zero_bytes(size: int, device: torch.device) -> torch.Tensor:
    """uint8 zeros [size]. On a CPU in huge pages if the kernel has any: copies of blocks are a
    fifth faster (docs/kv-offload.md)."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


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
        self.block_bytes = block_bytes(config, block_size, dtype)
        self.data = zero_bytes(num_blocks * self.block_bytes, device).view(dtype).view(shape)

    def settle(self) -> None:
        """Wait until all that the model has written is there."""
        if self.data.device.type == "cuda":
            torch.cuda.current_stream(self.data.device).synchronize()

    def as_bytes(self) -> torch.Tensor:
        """uint8 view [num_blocks, block_bytes] of the same memory."""
        return self.data.view(self.num_blocks, -1).view(torch.uint8)
