"""OPT decoders, the model family of the FastServe paper, in PyTorch and one rank.

LayerNorm before attention and MLP, learned positions, ReLU, biases everywhere, and the embedding as
head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F

from fastserve.worker.model.attention import PagedAttention
from fastserve.worker.model.backend import Int8Linear, Linear
from fastserve.worker.model.batch import Batch
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.kv_cache import KvCache
from fastserve.worker.model.weights import Weights

_FIRST_POSITION: Final = 2  # of the table of positions: the rows before it mean padding


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm over the last dimension; weight and bias [hidden]."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


@dataclass(frozen=True, slots=True)
class OptLayer:
    """Weights of one decoder layer; Q, K and V are fused into one product."""

    attention_norm: Norm
    qkv: Linear | Int8Linear  # [hidden -> 3 * hidden]
    output: Linear | Int8Linear
    mlp_norm: Norm
    up: Linear | Int8Linear  # [hidden -> intermediate]
    down: Linear | Int8Linear


class OptModel:
    """A decoder with its weights, on one device in one dtype."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: torch.Tensor,
        positions: torch.Tensor,
        layers: list[OptLayer],
        final_norm: Norm,
        linear: type[Linear] | type[Int8Linear],
    ) -> None:
        """embedding [vocab, hidden]; positions [max_position_embeddings + 2, hidden]."""
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self._embedding, self._positions = embedding, positions
        self._layers = layers
        self._final_norm = final_norm
        self._head = linear(embedding)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KvCache) -> torch.Tensor:
        """Run one iteration: logits [len(batch.logit_rows), vocab] in float32.

        K and V of all new tokens are in `kv` afterwards.
        """
        config = self.config
        attention = PagedAttention(batch, kv, config)
        x = self._embedding[torch.tensor(batch.token_ids, device=self.device)]
        x = x + self._positions[attention.positions + _FIRST_POSITION]
        for index, layer in enumerate(self._layers):
            heads = layer.qkv(layer.attention_norm(x))
            q, k, v = heads.view(x.shape[0], 3, config.num_heads, config.head_dim).unbind(dim=1)
            x = x + layer.output(attention(index, q, k, v))
            x = x + layer.down(F.relu(layer.up(layer.mlp_norm(x))))
        if not batch.logit_rows:
            return x.new_empty(0, config.vocab_size, dtype=torch.float32)
        return self._head(self._final_norm(x[attention.logit_tokens])).float()


def load_opt(
    folder: Path, dtype: torch.dtype, device: torch.device, *, int8: bool = False
) -> OptModel:
    """Load a prepared folder. int8: quantise the weights, and the inputs of products.

    Raises `ModelError` for missing, truncated or ill-shaped weights.
    """
    config = ModelConfig.from_folder(folder)
    linear = Int8Linear if int8 else Linear
    weights = Weights(folder, config, dtype, device)
    hidden, middle = config.hidden_size, config.intermediate_size
    decoder = "model.decoder"

    def norm(name: str) -> Norm:
        return Norm(weights.take(f"{name}.weight", hidden), weights.take(f"{name}.bias", hidden))

    def product(outputs: int, inputs: int, *names: str) -> Linear | Int8Linear:
        return linear(
            torch.cat([weights.take(f"{name}.weight", outputs, inputs) for name in names]),
            torch.cat([weights.take(f"{name}.bias", outputs) for name in names]),
        )

    def layer(prefix: str) -> OptLayer:
        attention = f"{prefix}.self_attn"
        return OptLayer(
            attention_norm=norm(f"{prefix}.self_attn_layer_norm"),
            qkv=product(hidden, hidden, *(f"{attention}.{name}_proj" for name in "qkv")),
            output=product(hidden, hidden, f"{attention}.out_proj"),
            mlp_norm=norm(f"{prefix}.final_layer_norm"),
            up=product(middle, hidden, f"{prefix}.fc1"),
            down=product(hidden, middle, f"{prefix}.fc2"),
        )

    rows = config.max_position_embeddings + _FIRST_POSITION
    return OptModel(
        config,
        weights.take(f"{decoder}.embed_tokens.weight", config.vocab_size, hidden),
        weights.take(f"{decoder}.embed_positions.weight", rows, hidden),
        [layer(f"{decoder}.layers.{index}") for index in range(config.num_layers)],
        norm(f"{decoder}.final_layer_norm"),
        linear,
    )
