"""Weights from the safetensors files of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastserve.worker.model.backend import Linear
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.errors import ModelError
from fastserve.worker.model.files import weight_files
from fastserve.worker.model.llama import Layer, Model


class _Weights:
    """Tensors by name over all files, checked for shape as they are taken."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
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

    def has(self, name: str) -> bool:
        return name in self._where

    def take(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self._where:
            raise ModelError(f"{self._folder}: the weights lack the tensor {name}")
        file, opened = self._where[name]
        tensor: torch.Tensor = opened.get_tensor(name)
        if tensor.shape != shape:
            raise ModelError(
                f"{file}: {name} has shape {list(tensor.shape)}, config.json says {list(shape)}"
            )
        return tensor.to(self._device, self._dtype)

    def linear(self, parts: list[tuple[str, int]], inputs: int, *, bias: bool) -> Linear:
        """One product for several weights [rows, inputs], stacked."""
        weight = torch.cat([self.take(f"{name}.weight", rows, inputs) for name, rows in parts])
        if not bias:
            return Linear(weight)
        return Linear(weight, torch.cat([self.take(f"{name}.bias", rows) for name, rows in parts]))


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Model:
    """Load a prepared folder.

    Raises `ModelError` for missing, truncated or ill-shaped weights.
    """
    config = ModelConfig.from_folder(folder)
    weights = _Weights(folder, dtype, device)
    hidden = config.hidden_size
    embedding = weights.take("model.embed_tokens.weight", config.vocab_size, hidden)
    layers = [_layer(weights, config, f"model.layers.{i}") for i in range(config.num_layers)]
    final_norm = weights.take("model.norm.weight", hidden)
    tied = config.tie_word_embeddings or not weights.has("lm_head.weight")
    head = embedding if tied else weights.take("lm_head.weight", config.vocab_size, hidden)
    return Model(config, embedding, layers, final_norm, Linear(head))


def _layer(weights: _Weights, config: ModelConfig, prefix: str) -> Layer:
    hidden, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return Layer(
        input_norm=weights.take(f"{prefix}.input_layernorm.weight", hidden),
        qkv=weights.linear(
            [
                (f"{attention}.q_proj", queries),
                (f"{attention}.k_proj", keys),
                (f"{attention}.v_proj", keys),
            ],
            hidden,
            bias=config.qkv_bias,
        ),
        query_norm=weights.take(f"{attention}.q_norm.weight", dim) if config.qk_norm else None,
        key_norm=weights.take(f"{attention}.k_norm.weight", dim) if config.qk_norm else None,
        output=weights.linear([(f"{attention}.o_proj", hidden)], queries, bias=config.output_bias),
        post_norm=weights.take(f"{prefix}.post_attention_layernorm.weight", hidden),
        gate_up=weights.linear(
            [
                (f"{mlp}.gate_proj", config.intermediate_size),
                (f"{mlp}.up_proj", config.intermediate_size),
            ],
            hidden,
            bias=False,
        ),
        down=weights.linear([(f"{mlp}.down_proj", hidden)], config.intermediate_size, bias=False),
    )
