"""From a model folder to a model that runs, in PyTorch or in the CPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import structlog
import torch

from fastserve.worker.model.backend import Int8Linear, Linear
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.errors import ModelError
from fastserve.worker.model.llama import Layer, Model
from fastserve.worker.model.mlp import ACTIVATIONS, Mixture, Mlp
from fastserve.worker.model.native import NativeModel, why_not_native
from fastserve.worker.model.weights import Matrix, Weights
from fastserve.worker.native.library import Library
from fastserve.worker.parallel.shards import Shard

log = structlog.get_logger(__name__)


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    int8: bool = False,
    shard: Shard | None = None,
) -> Model:
    """Load a prepared folder for PyTorch. int8: quantise the weights, and the inputs of products.
    shard: load that part alone; its model's embedding and head are empty where it has none.

    Raises `ModelError` for missing, truncated or ill-shaped weights, and for int8 experts.
    """
    config = ModelConfig.from_folder(folder)
    if int8 and config.experts is not None:
        raise ModelError(f"{folder}: quantization int8 of a mixture of experts is not supported")
    weights = Weights(folder, config, dtype, device, shard)
    linear = Int8Linear if int8 else Linear
    nothing = torch.empty(0, config.hidden_size, dtype=dtype, device=device)
    first, last = (shard.first, shard.last) if shard else (True, True)
    embedding = weights.embedding() if first else nothing
    numbers = shard.layers if shard else range(config.num_layers)
    layers = [_layer(weights, config, i, linear) for i in numbers]
    final_norm = weights.final_norm()
    head = weights.head() if last else nothing
    if head is None:
        head = embedding if first else weights.embedding()
    if shard is not None:
        log.info("a shard is loaded", bytes_read=weights.bytes_read, layers=str(numbers))
        config = shard.config(config)
    return Model(config, embedding, layers, final_norm, linear(head))


def load_native(
    folder: Path,
    dtype: torch.dtype,
    library: Library,
    *,
    block_size: int,
    threads: int,
    int8: bool = False,
) -> NativeModel:
    """Load a prepared folder for the CPU kernels; dtype is float32 or bfloat16.

    Raises `ModelError` as `load_model` does, and for models that the kernels cannot run.
    """
    config = ModelConfig.from_folder(folder)
    if why := why_not_native(config, block_size):
        raise ModelError(f"{folder}: the CPU kernels cannot be used: {why}")
    # Packed from float32, one layer at a time; only the embedding stays as a tensor.
    weights = Weights(folder, config, torch.float32, torch.device("cpu"))
    model = NativeModel(config, dtype, library, block_size=block_size, threads=threads, int8=int8)
    for index in range(config.num_layers):
        model.set_layer(index, weights.layer(index), weights.mlp(index))
    head = weights.head()
    model.set_ends(
        weights.embedding(dtype),
        weights.final_norm(),
        weights.embedding() if head is None else head,
    )
    return model


def _layer(
    weights: Weights, config: ModelConfig, index: int, linear: type[Linear] | type[Int8Linear]
) -> Layer:
    def product(matrix: Matrix) -> Linear | Int8Linear:
        return linear(matrix.weight, matrix.bias)

    layer = weights.layer(index)
    return Layer(
        input_norm=layer.input_norm,
        qkv=product(layer.qkv),
        query_norm=layer.query_norm,
        key_norm=layer.key_norm,
        output=product(layer.output),
        post_norm=layer.post_norm,
        mlp=_mlp(weights, config, index, product),
    )


def _mlp(
    weights: Weights,
    config: ModelConfig,
    index: int,
    product: Callable[[Matrix], Linear | Int8Linear],
) -> Mlp | Mixture:
    activation = ACTIVATIONS[config.activation]
    experts = config.experts_of(index)
    if experts is None:
        mlp = weights.mlp(index)
        return Mlp(product(mlp.gate_up), product(mlp.down), activation)
    mixture = weights.mixture(index, experts)
    return Mixture(
        router=mixture.router,
        gate_up=mixture.gate_up,
        down=mixture.down,
        per_token=experts.per_token,
        normalised=experts.normalised,
        activation=activation,
    )
