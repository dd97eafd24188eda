"""`python -m fastserve.worker.bench.perplexity`: what a number format costs in quality.

The perplexity of a model on a fixed text in float32, and in the other formats beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer

from fastserve.common.errors import StartupError
from fastserve.worker.model.batch import Batch
from fastserve.worker.model.choose import choose, load
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.files import DEFAULT_MODEL, prepare
from fastserve.worker.model.kv_cache import KvCache

TEXT = Path(__file__).parent / "text.txt"
_CHUNK = 256  # tokens whose logits are held at a time


class Scored(Protocol):
    """A model as this module needs it."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device

    def forward(self, batch: Batch, kv: KvCache) -> torch.Tensor: ...


def perplexity(model: Scored, tokens: Sequence[int], window: int = 512) -> float:
    """exp of the mean surprise at tokens[i] after what stands before it in its window.

    The text is cut into windows of `window` tokens that know nothing of each other.
    """
    size = 16
    kv = KvCache(model.config, -(-window // size), size, model.dtype, model.device)
    table = list(range(kv.num_blocks))
    total, count = 0.0, 0
    for start in range(0, len(tokens), window):
        part = list(tokens[start : start + window])
        for first in range(0, len(part), _CHUNK):
            chunk = part[first : first + _CHUNK]
            # Rows of one token each, on the same blocks: so that every position gives its logits.
            batch = Batch(
                token_ids=chunk,
                query_lens=[1] * len(chunk),
                context_lens=[first + i + 1 for i in range(len(chunk))],
                block_tables=[table] * len(chunk),
                logit_rows=list(range(len(chunk))),
            )
            logprobs = model.forward(batch, kv).log_softmax(dim=-1)
            targets = torch.tensor(part[first + 1 : first + 1 + len(chunk)])
            found = logprobs[: len(targets)].gather(1, targets[:, None])
            total -= float(found.double().sum())
            count += len(targets)
    return math.exp(total / count)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="fastserve-perplexity", description="Compare number formats by perplexity on a text."
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder, .gguf file or the default")
    parser.add_argument("--text", type=Path, default=TEXT, help="a file (default: our own)")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of the text")
    arguments = parser.parse_args()
    try:
        folder = prepare(arguments.model, progress=lambda line: print(line, file=sys.stderr))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = arguments.text.read_text()
        tokens = tokenizer.encode(text, add_special_tokens=False).ids[: arguments.max_tokens]
        config = ModelConfig.from_folder(folder)
        exact = 0.0
        for dtype, quantization in (("float32", "none"), ("bfloat16", "none"), ("auto", "int8")):
            way = choose(config, device="cpu", dtype=dtype, quantization=quantization)
            found = perplexity(load(folder, way), tokens)
            exact = exact or found
            print(f"{found:9.4f}  {found / exact - 1:+7.2%}  {way.description}", flush=True)
    except (StartupError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"perplexity of {folder.name} on {len(tokens)} tokens of {arguments.text.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
