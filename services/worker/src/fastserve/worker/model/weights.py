"""Weights from the safetensors files of a model folder, checked and fused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.errors import ModelError
from fastserve.worker.model.files import weight_files
from fastserve.worker.parallel.shards import Shard


@dataclass(frozen=True, slots=True)
class Matrix:
    """weight [out, in] and bias [out] of y = x W^T + b; QKV and gate/up are stacked."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: torch.Tensor
    qkv: Matrix  # [hidden -> (heads + 2 * kv heads) * dim]
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Matrix
    post_norm: torch.Tensor
    gate_up: Matrix  # [hidden -> 2 * intermediate]
    down: Matrix


class Weights:
    """Tensors of a prepared folder, read as they are asked for.

    Every method raises `ModelError` for missing, truncated or ill-shaped weights.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard | None = None,
    ) -> None:
        """config: of the whole model. shard: read nothing else of it."""
        self._config, self._shard = config, shard
        self.bytes_read = 0
        self._dtype, self._device = dtype, device
        self._where: dict[str, tuple[Path, Any]] = {}
        self._folder = folder
        for file in weight_files(folder):
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} cannot be read: {error}") from error
            names: list[str] = list(opened.keys())  # type: ignore[no-untyped-call]
            self._where.update((name, (file, opened)) for name in names)

    def embedding(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[vocab, hidden]"""
        return self._vocabulary("model.embed_tokens.weight", dtype)

    def head(self) -> torch.Tensor | None:
        """[vocab, hidden]; None if it is the embedding."""
        if self._config.tie_word_embeddings or "lm_head.weight" not in self._where:
            return None
        return self._vocabulary("lm_head.weight")

    def final_norm(self) -> torch.Tensor:
        """[hidden]"""
        return self.take("model.norm.weight", self._config.hidden_size)

    def layer(self, index: int) -> LayerWeights:
        """Layer `index` of the whole model, counted from 0."""
        config, prefix, shard = self._config, f"model.layers.{index}", self._shard
        hidden, dim, middle = config.hidden_size, config.head_dim, config.intermediate_size
        queries, keys = config.num_heads * dim, config.num_kv_heads * dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        q = _features(shard.heads, dim) if shard else range(queries)
        kv = _features(shard.kv_heads, dim) if shard else range(keys)
        mid = shard.middle if shard else range(middle)
        qkv = [("q_proj", queries, q), ("k_proj", keys, kv), ("v_proj", keys, kv)]
        return LayerWeights(
            input_norm=self.take(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self._stacked(attention, qkv, hidden, bias=config.qkv_bias),
            query_norm=self.take(f"{attention}.q_norm.weight", dim) if config.qk_norm else None,
            key_norm=self.take(f"{attention}.k_norm.weight", dim) if config.qk_norm else None,
            output=self._row_parallel(
                f"{attention}.o_proj", hidden, queries, q, bias=config.output_bias
            ),
            post_norm=self.take(f"{prefix}.post_attention_layernorm.weight", hidden),
            gate_up=self._stacked(
                mlp, [("gate_proj", middle, mid), ("up_proj", middle, mid)], hidden, bias=False
            ),
            down=self._row_parallel(f"{mlp}.down_proj", hidden, middle, mid, bias=False),
        )

    def take(
        self,
        name: str,
        *shape: int,
        rows: range | None = None,
        columns: range | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The tensor, or these rows or columns of it. shape: of the whole tensor."""
        if name not in self._where:
            raise ModelError(f"{self._folder}: the weights lack the tensor {name}")
        file, opened = self._where[name]
        part = opened.get_slice(name)
        if tuple(part.get_shape()) != shape:
            raise ModelError(
                f"{file}: {name} has shape {part.get_shape()}, config.json says {list(shape)}"
            )
        if columns is not None and len(columns) < shape[1]:
            tensor: torch.Tensor = part[:, columns.start : columns.stop]
        elif rows is not None and len(rows) < shape[0]:
            tensor = part[rows.start : rows.stop]
        else:
            tensor = opened.get_tensor(name)
        self.bytes_read += tensor.nbytes
        return tensor.to(self._device, dtype or self._dtype)

    def _vocabulary(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        config = self._config
        rows = self._shard.vocab if self._shard else None
        return self.take(name, config.vocab_size, config.hidden_size, rows=rows, dtype=dtype)

    def _stacked(
        self, prefix: str, parts: list[tuple[str, int, range]], inputs: int, *, bias: bool
    ) -> Matrix:
        """One product for several weights (name, outputs, those wanted)."""
        named = [(f"{prefix}.{name}", count, rows) for name, count, rows in parts]
        weight = torch.cat(
            [self.take(f"{name}.weight", count, inputs, rows=rows) for name, count, rows in named]
        )
        if not bias:
            return Matrix(weight)
        return Matrix(
            weight,
            torch.cat([self.take(f"{name}.bias", count, rows=rows) for name, count, rows in named]),
        )

    def _row_parallel(
        self, name: str, outputs: int, inputs: int, columns: range, *, bias: bool
    ) -> Matrix:
        """Products of some of the inputs; one shard of all adds the bias."""
        weight = self.take(f"{name}.weight", outputs, inputs, columns=columns)
        if not bias or (self._shard is not None and not self._shard.bias):
            return Matrix(weight)
        return Matrix(weight, self.take(f"{name}.bias", outputs))


def _features(heads: range, dim: int) -> range:
    return range(heads.start * dim, heads.stop * dim)
