"""GGUF to a Hugging Face folder: weights dequantised to bf16 safetensors, config and tokenizer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file

from fastserve.worker.model.errors import ModelError

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Tables that follow from the configuration.
_DERIVED = {"rope_freqs.weight"}


def convert_gguf(source: Path, target: Path, progress: Callable[[str], None]) -> None:
    """Write config.json, generation_config.json, tokenizer files and model.safetensors.

    Raises `ModelError` for a file that is truncated or no GGUF, and for architectures and tensors
    that are not supported.
    """
    progress(f"reading {source.name}")
    try:
        reader = GGUFReader(source)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelError(f"{source} is truncated or no GGUF file: {error}") from error
    fields = _Fields(source, reader)
    config = _config(fields, {tensor.name for tensor in reader.tensors})
    progress(f"converting {len(reader.tensors)} tensors to bf16")
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        if tensor.name in _DERIVED:
            continue
        name = _name(source, tensor.name)
        try:
            # A copy: float tensors come as read-only views of the file.
            values = np.array(dequantize(tensor.data, tensor.tensor_type))
        except (ValueError, NotImplementedError, KeyError) as error:
            raise ModelError(f"{source}: {tensor.name} cannot be dequantised: {error}") from error
        if config["architectures"] == ["LlamaForCausalLM"] and ".self_attn." in name:
            values = _unpermute(name, values, config)
        weights[name] = torch.from_numpy(values).to(torch.bfloat16)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2))
    (target / "generation_config.json").write_text(
        json.dumps({"eos_token_id": config["eos_token_id"]}, indent=2)
    )
    progress("converting the tokenizer")
    _save_tokenizer(source, target)


class _Fields:
    """Metadata of the file, with the architecture's prefix filled in."""

    def __init__(self, source: Path, reader: GGUFReader) -> None:
        self._source, self._reader = source, reader
        self.architecture = str(self.get("general.architecture", prefix=False))

    def get(self, key: str, default: Any = None, *, prefix: bool = True) -> Any:
        name = f"{self.architecture}.{key}" if prefix else key
        field = self._reader.get_field(name)
        if field is not None:
            return field.contents()
        if default is None:
            raise ModelError(f"{self._source}: the metadata lacks {name}")
        return default


def _config(fields: _Fields, tensors: set[str]) -> dict[str, Any]:
    if fields.architecture not in _ARCHITECTURES:
        raise ModelError(
            f"{fields._source}: architecture {fields.architecture} is not supported "
            f"(supported: {', '.join(_ARCHITECTURES)})"
        )
    scaling = fields.get("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise ModelError(f"{fields._source}: scaled rotary embeddings in GGUF are not supported")
    heads = int(fields.get("attention.head_count"))
    hidden = int(fields.get("embedding_length"))
    return {
        "architectures": [_ARCHITECTURES[fields.architecture]],
        "model_type": fields.architecture,
        "torch_dtype": "bfloat16",
        "vocab_size": len(fields.get("tokenizer.ggml.tokens", prefix=False)),
        "hidden_size": hidden,
        "intermediate_size": int(fields.get("feed_forward_length")),
        "num_hidden_layers": int(fields.get("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get("attention.head_count_kv", heads)),
        "head_dim": int(fields.get("attention.key_length", hidden // heads)),
        "hidden_act": "silu",
        "rms_norm_eps": float(fields.get("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(fields.get("rope.freq_base", 10000.0)),
        "max_position_embeddings": int(fields.get("context_length")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": int(fields.get("tokenizer.ggml.bos_token_id", 0, prefix=False)),
        "eos_token_id": int(fields.get("tokenizer.ggml.eos_token_id", prefix=False)),
    }


def _name(source: Path, gguf_name: str) -> str:
    stem, _, kind = gguf_name.rpartition(".")
    if stem in _TENSORS:
        return f"{_TENSORS[stem]}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match is None or match[2] not in _LAYER_TENSORS:
        raise ModelError(f"{source}: tensor {gguf_name} is not part of a supported model")
    return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.{kind}"


def _unpermute(name: str, values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Undo the row order that GGUF gives Q and K of Llama models.

    GGUF interleaves the two rotary halves of a head; Hugging Face keeps them one after the other.
    """
    if ".q_proj." in name:
        heads = config["num_attention_heads"]
    elif ".k_proj." in name:
        heads = config["num_key_value_heads"]
    else:
        return values
    dim = values.shape[0] // heads
    return values.reshape(heads, dim // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


def _save_tokenizer(source: Path, target: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched, whatever is missing
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{source}: the tokenizer cannot be converted: {error}") from error
    tokenizer.save_pretrained(str(target))
