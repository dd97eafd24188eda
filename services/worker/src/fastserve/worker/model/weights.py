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
        self, folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config = config
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
        config = self._config
        shape = (config.vocab_size, config.hidden_size)
        return self._take("model.embed_tokens.weight", *shape, dtype=dtype)

    def head(self) -> torch.Tensor | None:
        """[vocab, hidden]; None if it is the embedding."""
        config = self._config
        if config.tie_word_embeddings or "lm_head.weight" not in self._where:
            return None
        return self._take("lm_head.weight", config.vocab_size, config.hidden_size)

    def final_norm(self) -> torch.Tensor:
        """[hidden]"""
        return self._take("model.norm.weight", self._config.hidden_size)

    def layer(self, index: int) -> LayerWeights:
        """Layer `index`, counted from 0."""
        config, prefix = self._config, f"model.layers.{index}"
        hidden, dim, middle = config.hidden_size, config.head_dim, config.intermediate_size
        queries, keys = config.num_heads * dim, config.num_kv_heads * dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)]
        return LayerWeights(
            input_norm=self._take(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self._stacked(attention, qkv, hidden, bias=config.qkv_bias),
            query_norm=self._take(f"{attention}.q_norm.weight", dim) if config.qk_norm else None,
            key_norm=self._take(f"{attention}.k_norm.weight", dim) if config.qk_norm else None,
            output=self._stacked(attention, [("o_proj", hidden)], queries, bias=config.output_bias),
            post_norm=self._take(f"{prefix}.post_attention_layernorm.weight", hidden),
            gate_up=self._stacked(
                mlp, [("gate_proj", middle), ("up_proj", middle)], hidden, bias=False
            ),
            down=self._stacked(mlp, [("down_proj", hidden)], middle, bias=False),
        )

    def _take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name not in self._where:
            raise ModelError(f"{self._folder}: the weights lack the tensor {name}")
        file, opened = self._where[name]
        tensor: torch.Tensor = opened.get_tensor(name)
        if tensor.shape != shape:
            raise ModelError(
                f"{file}: {name} has shape {list(tensor.shape)}, config.json says {list(shape)}"
            )
        return tensor.to(self._device, dtype or self._dtype)

    def _stacked(
        self, prefix: str, parts: list[tuple[str, int]], inputs: int, *, bias: bool
    ) -> Matrix:
        """One product for several weights [rows, inputs]."""
        names = [(f"{prefix}.{name}", rows) for name, rows in parts]
        weight = torch.cat([self._take(f"{name}.weight", rows, inputs) for name, rows in names])
        if not bias:
            return Matrix(weight)
        return Matrix(weight, torch.cat([self._take(f"{name}.bias", rows) for name, rows in names]))
