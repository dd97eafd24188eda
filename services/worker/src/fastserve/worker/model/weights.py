"""Weights from the safetensors files of a model folder, checked and fused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastserve.worker.model.config import MIXTRAL, Experts, ModelConfig
from fastserve.worker.model.errors import ModelError
from fastserve.worker.model.files import weight_files
from fastserve.worker.parallel.shards import Shard

# What a mixture, and gate, up and down of one of its experts are called.
_MIXTRAL_NAMES = ("block_sparse_moe", "w1", "w3", "w2")
_EXPERT_NAMES = ("mlp", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Matrix:
    """weight [out, in] and bias [out] of y = x W^T + b; QKV and gate/up are stacked."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer without its MLP."""

    input_norm: torch.Tensor
    qkv: Matrix  # [hidden -> (heads + 2 * kv heads) * dim]
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Matrix
    post_norm: torch.Tensor


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """A gated MLP."""

    gate_up: Matrix  # [hidden -> 2 * intermediate]
    down: Matrix


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The gated MLPs of a layer. intermediate: rounded up to a multiple of 8 with zeros, since
    grouped products want rows of 16 bytes."""

    router: torch.Tensor  # [experts, hidden]
    gate_up: torch.Tensor  # [experts, 2 * intermediate, hidden]
    down: torch.Tensor  # [experts, hidden, intermediate]


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
        return self._norm("model.norm", self._config.hidden_size)

    def layer(self, index: int) -> LayerWeights:
        """Layer `index` of the whole model, counted from 0."""
        config, prefix, shard = self._config, f"model.layers.{index}", self._shard
        hidden, dim = config.hidden_size, config.head_dim
        queries, keys = config.num_heads * dim, config.num_kv_heads * dim
        attention = f"{prefix}.self_attn"
        q = _features(shard.heads, dim) if shard else range(queries)
        kv = _features(shard.kv_heads, dim) if shard else range(keys)
        qkv = [("q_proj", queries, q), ("k_proj", keys, kv), ("v_proj", keys, kv)]
        return LayerWeights(
            input_norm=self._norm(f"{prefix}.input_layernorm", hidden),
            qkv=self._stacked(attention, qkv, hidden, bias=config.qkv_bias),
            query_norm=self._norm(f"{attention}.q_norm", dim) if config.qk_norm else None,
            key_norm=self._norm(f"{attention}.k_norm", dim) if config.qk_norm else None,
            output=self._row_parallel(
                f"{attention}.o_proj", hidden, queries, q, bias=config.output_bias
            ),
            post_norm=self._norm(f"{prefix}.post_attention_layernorm", hidden),
        )

    def mlp(self, index: int) -> MlpWeights:
        """Of a layer with an ordinary MLP."""
        hidden, middle = self._config.hidden_size, self._config.intermediate_size
        prefix = f"model.layers.{index}.mlp"
        own = self._shard.middle if self._shard else range(middle)
        return MlpWeights(
            gate_up=self._stacked(
                prefix, [("gate_proj", middle, own), ("up_proj", middle, own)], hidden, bias=False
            ),
            down=self._row_parallel(f"{prefix}.down_proj", hidden, middle, own, bias=False),
        )

    def mixture(self, index: int, experts: Experts) -> ExpertWeights:
        """Of a layer with experts. A shard has a part of each expert, and the whole router."""
        hidden, middle = self._config.hidden_size, experts.intermediate_size
        names = _MIXTRAL_NAMES if self._config.architecture == MIXTRAL else _EXPERT_NAMES
        where, gate, up, down = names
        prefix = f"model.layers.{index}.{where}"
        own = self._shard.expert_middle if self._shard else range(middle)
        size, padded = len(own), -(-len(own) // 8) * 8
        zeros = partial(torch.zeros, dtype=self._dtype, device=self._device)
        gate_up = zeros(experts.count, 2, padded, hidden)
        downs = zeros(experts.count, hidden, padded)
        for number in range(experts.count):
            name = f"{prefix}.experts.{number}"
            for half, part in enumerate((gate, up)):
                gate_up[number, half, :size] = self.take(
                    f"{name}.{part}.weight", middle, hidden, rows=own
                )
            downs[number, :, :size] = self.take(
                f"{name}.{down}.weight", hidden, middle, columns=own
            )
        router = self.take(f"{prefix}.gate.weight", experts.count, hidden)
        return ExpertWeights(router, gate_up.flatten(1, 2), downs)

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

    def _norm(self, name: str, size: int) -> torch.Tensor:
        """What to multiply by [size]; in float32 if 1 is added."""
        if self._config.norm_offset:
            return 1 + self.take(f"{name}.weight", size, dtype=torch.float32)
        return self.take(f"{name}.weight", size)

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
