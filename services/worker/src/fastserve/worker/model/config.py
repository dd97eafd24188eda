"""What a Hugging Face `config.json` says about a supported model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastserve.worker.model.errors import ModelError

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "GemmaForCausalLM",
    "OPTForCausalLM",
)
OPT = "OPTForCausalLM"
GEMMA = "GemmaForCausalLM"
MIXTRAL = "MixtralForCausalLM"
QWEN3_MOE = "Qwen3MoeForCausalLM"
_TANH_GELU = "gelu_pytorch_tanh"
_ACTIVATIONS = {OPT: "relu", GEMMA: _TANH_GELU}  # of the others: silu
# What sets opt-350m and Galactica apart from the rest of the family, with the usual values.
_OPT_ONLY = {
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base frequency and how it is stretched for long contexts."""

    theta: float
    kind: str = "default"  # default, linear or llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: MLPs of which a router chooses some for every token."""

    count: int
    per_token: int
    intermediate_size: int
    normalised: bool  # the weights of the chosen ones are made to add up to 1
    dense_layers: tuple[int, ...]  # that have an ordinary MLP instead


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a decoder: of the Llama family, or OPT, which has no use for some."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    sliding_window: int | None  # tokens a query sees, itself included; None: all
    eos_token_ids: tuple[int, ...]
    activation: str = "silu"  # of the MLP: silu, gelu_pytorch_tanh or relu
    embedding_scale: float = 1.0
    norm_offset: bool = False  # RMSNorm multiplies by 1 + weight, in float32
    experts: Experts | None = None

    def experts_of(self, layer: int) -> Experts | None:
        """None: the layer has an ordinary MLP."""
        if self.experts is None or layer in self.experts.dense_layers:
            return None
        return self.experts

    def layer_weights(self, layer: int, chosen: float | None = None) -> float:
        """Numbers in the matrices of a layer; of experts, in `chosen` of them (None: in all)."""
        hidden = self.hidden_size
        attention = 2 * hidden * (self.num_heads + self.num_kv_heads) * self.head_dim
        if (experts := self.experts_of(layer)) is not None:
            each = 3 * hidden * experts.intermediate_size
            count = experts.count if chosen is None else chosen
            return attention + hidden * experts.count + count * each
        products = 2 if self.architecture == OPT else 3  # up and down; gate
        return attention + products * hidden * self.intermediate_size

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read config.json and generation_config.json.

        Raises `ModelError` for a missing or broken file and for anything the model does not
        implement: an option that is not understood is refused, never ignored.
        """
        path = folder / "config.json"
        raw = _read_json(path)
        names = raw.get("architectures") or ["none"]
        name = names[0] if isinstance(names, list) else names
        if name not in ARCHITECTURES:
            raise ModelError(
                f"{path}: architecture {name} is not supported "
                f"(supported: {', '.join(ARCHITECTURES)})"
            )
        try:
            if name == OPT:
                raw = _opt_in_common_words(path, raw)
            elif name == GEMMA:
                raw = _gemma_in_common_words(path, raw)
            _refuse_unsupported(path, raw, _ACTIVATIONS.get(name, "silu"))
            return cls._from_raw(name, raw, _eos(folder, raw), path)
        except KeyError as error:
            raise ModelError(f"{path}: {error.args[0]} is missing") from error
        except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise ModelError(f"{path}: a value makes no sense: {error}") from error

    @classmethod
    def _from_raw(
        cls, architecture: str, raw: dict[str, Any], eos: tuple[int, ...], path: Path
    ) -> ModelConfig:
        heads = int(raw["num_attention_heads"])
        bias = bool(raw.get("attention_bias", False))
        window = raw.get("sliding_window")
        if architecture.startswith("Qwen") and not raw.get("use_sliding_window", False):
            window = None
        return cls(
            architecture=architecture,
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            intermediate_size=int(raw["intermediate_size"]),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope=_rope(path, raw, theta=1e6 if architecture == MIXTRAL else 1e4),
            max_position_embeddings=int(raw["max_position_embeddings"]),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=bias or architecture == "Qwen2ForCausalLM",
            output_bias=bias and architecture != "Qwen2ForCausalLM",
            qk_norm=architecture in ("Qwen3ForCausalLM", QWEN3_MOE),
            sliding_window=int(window) if window else None,
            eos_token_ids=eos,
            activation=_ACTIVATIONS.get(architecture, "silu"),
            embedding_scale=raw["hidden_size"] ** 0.5 if architecture == GEMMA else 1.0,
            norm_offset=architecture == GEMMA,
            experts=_experts(architecture, raw),
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value


def _refuse_unsupported(path: Path, raw: dict[str, Any], activation: str) -> None:
    found = raw.get("hidden_act", activation)
    if found != activation:
        raise ModelError(f"{path}: hidden_act {found} is not supported (only {activation})")
    if raw.get("quantization_config"):
        raise ModelError(f"{path}: quantized checkpoints (quantization_config) are not supported")
    if raw.get("mlp_bias"):
        raise ModelError(f"{path}: mlp_bias is not supported")
    if raw.get("use_sliding_window"):
        raise ModelError(f"{path}: use_sliding_window (a window in some layers) is not supported")


def _opt_in_common_words(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Raises `ModelError` for variants that are not implemented."""
    for name, usual in _OPT_ONLY.items():
        if raw.get(name, usual) != usual:
            raise ModelError(f"{path}: {name} {raw[name]} is not supported (only {usual})")
    if raw.get("word_embed_proj_dim", raw["hidden_size"]) != raw["hidden_size"]:
        raise ModelError(f"{path}: word_embed_proj_dim other than hidden_size is not supported")
    return {
        **raw,
        "hidden_act": "relu",
        "intermediate_size": raw["ffn_dim"],
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": None,
        "head_dim": None,
    }


def _gemma_in_common_words(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Raises `ModelError` for variants that are not implemented."""
    if raw.get("use_bidirectional_attention"):
        raise ModelError(f"{path}: use_bidirectional_attention is not supported")
    named = raw.get("hidden_activation") or _TANH_GELU
    if named != _TANH_GELU:
        raise ModelError(f"{path}: hidden_activation {named} is not supported (only {_TANH_GELU})")
    # The first files say gelu, and mean its approximation all the same.
    activation = raw.get("hidden_act", "gelu")
    return {
        **raw,
        "hidden_act": _TANH_GELU if activation == "gelu" else activation,
        "head_dim": raw["head_dim"],  # does not follow from the hidden size
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
    }


def _experts(architecture: str, raw: dict[str, Any]) -> Experts | None:
    """Raises KeyError, TypeError or ValueError for what makes no sense."""
    if architecture not in (MIXTRAL, QWEN3_MOE):
        return None
    # transformers writes num_local_experts, whatever the released files of a family say.
    name = "num_experts" if "num_experts" in raw else "num_local_experts"
    count, per_token = int(raw[name]), int(raw["num_experts_per_tok"])
    if not 1 <= per_token <= count:
        raise ValueError(f"num_experts_per_tok {per_token} of {count} experts")
    if raw["hidden_size"] % 8:
        raise ValueError(f"hidden_size {raw['hidden_size']} of experts is not a multiple of 8")
    if architecture == MIXTRAL:
        return Experts(count, per_token, int(raw["intermediate_size"]), True, ())
    dense, step = raw.get("mlp_only_layers") or [], int(raw.get("decoder_sparse_step", 1))
    layers = range(int(raw["num_hidden_layers"]))
    return Experts(
        count,
        per_token,
        int(raw["moe_intermediate_size"]),
        bool(raw.get("norm_topk_prob", False)),
        tuple(layer for layer in layers if layer in dense or (layer + 1) % step),
    )


def _rope(path: Path, raw: dict[str, Any], theta: float) -> Rope:
    """theta: where the file has none."""
    # transformers 5 writes rope_parameters; before it was rope_theta and rope_scaling.
    fields = dict(raw.get("rope_scaling") or {})
    fields.update(raw.get("rope_parameters") or {})
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(f"{path}: rope type {kind} is not supported (default, linear, llama3)")
    if float(fields.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ModelError(f"{path}: partial_rotary_factor is not supported")
    return Rope(
        theta=float(fields.get("rope_theta", raw.get("rope_theta", theta))),
        kind=kind,
        factor=float(fields.get("factor", 1.0)),
        low_freq_factor=float(fields.get("low_freq_factor", 1.0)),
        high_freq_factor=float(fields.get("high_freq_factor", 4.0)),
        original_max_position=int(fields.get("original_max_position_embeddings", 8192)),
    )


def _eos(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    found = raw.get("eos_token_id")
    if generation.exists():
        found = _read_json(generation).get("eos_token_id", found)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)
