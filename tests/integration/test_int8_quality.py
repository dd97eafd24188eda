"""What int8 costs the default model: less than 1 % of perplexity."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from fastserve.worker.bench.perplexity import TEXT, perplexity
from fastserve.worker.model.choose import choose, load
from fastserve.worker.model.config import ModelConfig


def test_perplexity_within_one_percent_of_float32(default_model_folder: Path) -> None:
    config = ModelConfig.from_folder(default_model_folder)
    tokenizer = Tokenizer.from_file(str(default_model_folder / "tokenizer.json"))
    tokens = tokenizer.encode(TEXT.read_text(), add_special_tokens=False).ids
    assert len(tokens) > 1000
    ways = (
        choose(config, device="cpu", dtype="float32"),
        choose(config, device="cpu", quantization="int8"),
    )
    exact, int8 = (perplexity(load(default_model_folder, way), tokens) for way in ways)
    assert 5 < exact < 50
    assert int8 < 1.01 * exact
