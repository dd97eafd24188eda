"""Llama-family decoders: RMSNorm, rotary attention with grouped KV heads, gated MLPs.

Covers Llama, Mistral, Qwen2 and Qwen3, which differ in biases, a norm on queries and keys, and a
sliding window; Mixtral and Qwen3-MoE, whose MLPs are mixtures; and Gemma, which scales embeddings,
adds 1 to the weights of norms and has another activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastserve.worker.model.attention import PagedAttention
from fastserve.worker.model.backend import Int8Linear, Linear
from fastserve.worker.model.batch import Batch
from fastserve.worker.model.config import ModelConfig, Rope
from fastserve.worker.model.kv_cache import KvCache
from fastserve.worker.model.mlp import Mixture, Mlp


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one decoder layer; Q, K and V are fused into one product."""

    input_norm: torch.Tensor
    qkv: Linear | Int8Linear  # [hidden -> (heads + 2 * kv heads) * dim]
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Linear | Int8Linear
    post_norm: torch.Tensor
    mlp: Mlp | Mixture


def rope_table(
    rope: Rope, head_dim: int, length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, head_dim] in float32 (halves repeated, Hugging Face layout)."""
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        # Long wavelengths are stretched, short ones kept, those between interpolated.
        wavelength = 2 * math.pi / inverse
        ratio = rope.original_max_position / wavelength
        smooth = (ratio - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = smooth.clamp(0.0, 1.0)
        inverse = (1 - smooth) * inverse / rope.factor + smooth * inverse
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(device), angles.sin().to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [T, heads, dim] with cos and sin [T, 1, dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _own(x: torch.Tensor) -> torch.Tensor:
    return x


class Model:
    """A decoder with its weights, on one device in one dtype."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: torch.Tensor,
        layers: list[Layer],
        final_norm: torch.Tensor,
        head: Linear | Int8Linear,
    ) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self._embedding = embedding
        # Rounded to the model's dtype, as in training: in bf16 the root of 3072 is 55.5.
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=self.dtype)
        self._layers = layers
        self._final_norm = final_norm
        self._head = head
        self._cos, self._sin = rope_table(
            config.rope, config.head_dim, config.max_position_embeddings, self.device
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KvCache) -> torch.Tensor:
        """Run one iteration: logits [len(batch.logit_rows), vocab] in float32.

        K and V of all new tokens are in `kv` afterwards.
        """
        attention = PagedAttention(batch, kv, self.config)
        x = self.layers(self.embed(batch), attention)
        if not batch.logit_rows:
            return x.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        return self.logits(x, attention)

    def embed(self, batch: Batch) -> torch.Tensor:
        """[T, hidden]"""
        return self.rows(torch.tensor(batch.token_ids, device=self.device))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [T, hidden] of the embedding, scaled; a shard has a part of them."""
        return self._embedding[ids] * self._embedding_scale

    def layers(
        self,
        x: torch.Tensor,
        attention: PagedAttention,
        reduce: Callable[[torch.Tensor], torch.Tensor] = _own,
    ) -> torch.Tensor:
        """All layers that this model has, on x [T, hidden]. reduce: makes a shard's products
        [T, hidden] those of the whole model."""
        config = self.config
        cos = self._cos[attention.positions][:, None].to(self.dtype)
        sin = self._sin[attention.positions][:, None].to(self.dtype)
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        for index, layer in enumerate(self._layers):
            normed = self._norm(x, layer.input_norm)
            heads = layer.qkv(normed).view(x.shape[0], -1, config.head_dim)
            q, k, v = torch.split(heads, sizes, dim=1)
            if layer.query_norm is not None and layer.key_norm is not None:
                q, k = self._norm(q, layer.query_norm), self._norm(k, layer.key_norm)
            attended = attention(index, rotate(q, cos, sin), rotate(k, cos, sin), v)
            x = x + reduce(layer.output(attended))
            x = x + reduce(layer.mlp(self._norm(x, layer.post_norm)))
        return x

    def logits(self, x: torch.Tensor, attention: PagedAttention) -> torch.Tensor:
        """float32 logits of the rows that want them, from the hidden states x [T, hidden]."""
        return self._head(self._norm(x[attention.logit_tokens], self._final_norm)).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # In the weight's dtype, which is the model's or, with an offset of 1, float32.
        normed = F.rms_norm(x.to(weight.dtype), weight.shape, weight, self.config.rms_norm_eps)
        return normed.to(x.dtype)
