"""Tiny models with random weights, saved by transformers as an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 320
EOS = 1
_SPECIAL = {"<s>": 0, "</s>": EOS}


def tiny_model(folder: Path, architecture: str = "Llama", seed: int = 0, **changes: Any) -> Any:
    """Write a model of the family into `folder`; returns the transformers model (fp32, eval).

    `changes` override the configuration: 3 layers, 4 heads of which 2 for K and V, width 64. All
    weights are random, norms and biases too, so that one that is left out or swapped shows.
    """
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        **changes,
    }
    config = getattr(transformers, f"{architecture}Config")(**values)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                usual = 0 if architecture == "Gemma" else 1  # Gemma itself adds 1
                weight.copy_(usual + 0.3 * noise)
            else:
                weight.copy_(0.15 * noise)
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return model


def byte_tokenizer() -> Tokenizer:
    """One token per byte, after the special ones: reads and writes any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {**_SPECIAL, **{byte: len(_SPECIAL) + i for i, byte in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer
