"""A model that runs in the CPU kernels: one call per iteration.

Every row of an iteration is computed by the same operations in the same order whatever stands
beside it, so its logits are the same bits alone, in any batch, and for any cut of its prompt.
"""

from __future__ import annotations

import ctypes
from array import array

import torch

from fastserve.worker.model.batch import Batch
from fastserve.worker.model.config import GEMMA, OPT, ModelConfig
from fastserve.worker.model.kv_cache import KvCache
from fastserve.worker.model.llama import rope_table
from fastserve.worker.model.weights import LayerWeights, Matrix, MlpWeights
from fastserve.worker.native.library import Dtype, Library, NativeBatch, Shape, Weight

_LANES = 16  # numbers in a vector of the kernels
_DTYPES = {torch.float32: Dtype.F32, torch.bfloat16: Dtype.BF16}


def why_not_native(config: ModelConfig, block_size: int) -> str:
    """Why the kernels cannot run a model; "" if they can."""
    if config.architecture == OPT:
        return "OPT is not of the Llama family"
    if config.architecture == GEMMA:
        return "Gemma has another activation and other norms"
    if config.experts is not None:
        return "the model is a mixture of experts"
    if config.head_dim % _LANES:
        return f"a head dimension of {config.head_dim} is not a multiple of {_LANES}"
    if block_size % _LANES:
        return f"a block size of {block_size} is not a multiple of {_LANES}"
    return ""


class NativeModel:
    """A decoder with its weights packed in the library's memory."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        library: Library,
        *,
        block_size: int,
        threads: int,
        int8: bool,
    ) -> None:
        """dtype: of the KV cache and, unless int8, of the weights. The weights follow."""
        self.config = config
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.bell = -1  # an eventfd that `forward` writes to once the interpreter is free
        self._library = library
        shape = Shape(
            layers=config.num_layers,
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            dim=config.head_dim,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            block_size=block_size,
            window=config.sliding_window or 0,
            weights=Dtype.INT8 if int8 else _DTYPES[dtype],
            kv=_DTYPES[dtype],
            threads=threads,
            epsilon=config.rms_norm_eps,
        )
        self._model = library.call("fs_model_new", ctypes.byref(shape))
        # The library keeps pointers to these.
        self._embedding = torch.empty(0)
        half = config.head_dim // 2
        cos, sin = rope_table(
            config.rope, config.head_dim, config.max_position_embeddings, self.device
        )
        self._cos, self._sin = cos[:, :half].contiguous(), sin[:, :half].contiguous()
        library.call("fs_model_rope", self._model, self._cos.data_ptr(), self._sin.data_ptr())

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._library.call("fs_model_free", self._model)

    def set_layer(self, index: int, weights: LayerWeights, mlp: MlpWeights) -> None:
        """Pack the float32 weights of a layer."""
        for which, matrix in (
            (Weight.QKV, weights.qkv),
            (Weight.OUTPUT, weights.output),
            (Weight.GATE_UP, mlp.gate_up),
            (Weight.DOWN, mlp.down),
        ):
            self._set_matrix(index, which, matrix)
        for which, vector in (
            (Weight.INPUT_NORM, weights.input_norm),
            (Weight.POST_NORM, weights.post_norm),
            (Weight.QUERY_NORM, weights.query_norm),
            (Weight.KEY_NORM, weights.key_norm),
        ):
            if vector is not None:
                self._set_vector(index, which, vector)

    def set_ends(
        self, embedding: torch.Tensor, final_norm: torch.Tensor, head: torch.Tensor
    ) -> None:
        """embedding [vocab, hidden] in the model's dtype; the rest in float32."""
        self._embedding = embedding.contiguous()
        self._library.call(
            "fs_model_embedding", self._model, _DTYPES[embedding.dtype], self._embedding.data_ptr()
        )
        self._set_vector(0, Weight.FINAL_NORM, final_norm)
        self._set_matrix(0, Weight.HEAD, Matrix(head))

    def _set_matrix(self, layer: int, which: Weight, matrix: Matrix) -> None:
        weight = matrix.weight.contiguous()
        bias = None if matrix.bias is None else matrix.bias.contiguous()
        self._library.call(
            "fs_model_matrix",
            self._model,
            layer,
            which,
            *weight.shape,
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
        )

    def _set_vector(self, layer: int, which: Weight, vector: torch.Tensor) -> None:
        values = vector.contiguous()
        self._library.call(
            "fs_model_vector", self._model, layer, which, len(values), values.data_ptr()
        )

    def forward(self, batch: Batch, kv: KvCache) -> torch.Tensor:
        """Run one iteration: logits [len(batch.logit_rows), vocab] in float32.

        K and V of all new tokens are in `kv` afterwards, laid out as csrc/attention.h says.
        """
        vocab = self.config.vocab_size
        stride = -(-vocab // _LANES) * _LANES
        logits = torch.empty(len(batch.logit_rows), stride)
        starts: list[int] = []
        flat: list[int] = []
        for table in batch.block_tables:
            starts.append(len(flat))
            flat += table
        arrays = [
            array("i", values)  # a third of the time of a NumPy array and its address
            for values in (
                batch.token_ids,
                batch.query_lens,
                batch.context_lens,
                flat,
                starts,
                batch.logit_rows,
            )
        ]
        native = NativeBatch(
            len(batch.token_ids),
            len(batch.query_lens),
            len(batch.logit_rows),
            *(numbers.buffer_info()[0] for numbers in arrays),
            kv.data.data_ptr(),
            logits.data_ptr(),
            stride,
            self.bell,
        )
        self._library.call("fs_model_forward", self._model, ctypes.byref(native))
        return logits[:, :vocab]
