from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer


@pytest.fixture(scope="session")
def reference_tokenizer(default_model_folder: Path) -> FastTokenizer:
    """The default model's tokenizer as the library itself encodes and decodes."""
    return FastTokenizer.from_file(str(default_model_folder / "tokenizer.json"))
