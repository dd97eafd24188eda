"""The text side of a model: tokenizer, chat template and token pieces, read from its folder.

`tokenizers` and Jinja are used directly: `transformers` imports torch, which a gateway must not
load, and takes seconds to start.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from fastserve.common.errors import StartupError
from fastserve.gateway.chat_template import ChatTemplate, template_source
from fastserve.gateway.detokenizer import Detokenizer, TokenPieces, UnsupportedDecoderError

T = TypeVar("T")

_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Everything the gateway knows about the text of one model.

    `encode` and `encode_chat` take milliseconds for long texts and belong off the event loop
    (`TokenizerPool`); they release the interpreter lock while they work.
    """

    def __init__(
        self, fast: FastTokenizer, template: ChatTemplate | None, vocab_size: int | None = None
    ) -> None:
        """`vocab_size`: rows of the model's embedding, if known. Raises `StartupError`."""
        self._fast = fast
        self._template = template
        try:
            self.pieces = TokenPieces(fast)
        except UnsupportedDecoderError as error:
            raise StartupError(str(error)) from error
        ids = fast.get_vocab(with_added_tokens=True).values()
        self._size = min(max(ids, default=-1) + 1, vocab_size or 2**32)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read a model folder. Raises `StartupError` naming the file and the reason."""
        if not folder.is_dir():
            raise StartupError(f"the model folder {folder} does not exist")
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise StartupError(f"{folder} holds no tokenizer: {file.name} is missing")
        try:
            fast = FastTokenizer.from_file(str(file))
        except Exception as error:  # the only type that the library raises
            raise StartupError(f"{file} cannot be read: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        special = {name: _content(config[name]) for name in _SPECIAL_TOKENS if config.get(name)}
        _apply_bos(fast, config, special)
        try:
            source = template_source(folder, config)
            template = None if source is None else ChatTemplate(source, special)
            return cls(fast, template, _read_json(folder / "config.json").get("vocab_size"))
        except (StartupError, ValueError) as error:
            raise StartupError(f"{folder}: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def knows(self, token_id: int) -> bool:
        """Whether the id is one of the vocabulary."""
        return 0 <= token_id < self._size and self._fast.id_to_token(token_id) is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokens that begin a sequence if the model has such."""
        # encode_batch_fast releases the interpreter lock, encode does not.
        encodings = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encodings[0].ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Token ids of a conversation through the chat template, which must exist.

        Raises `TemplateRefusedError`.
        """
        assert self._template is not None, "no chat template"
        prompt = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(prompt, add_special_tokens=add_special_tokens)

    def detokenizer(self, *, continuation: bool = False) -> Detokenizer:
        return Detokenizer(self.pieces, continuation=continuation)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of whole sequence, special tokens left out."""
        detokenizer = self.detokenizer()
        return "".join(map(detokenizer.feed, token_ids)) + detokenizer.flush()


class TokenizerPool:
    """Runs tokenizer work in a few threads, so that a long prompt does not stop the streams."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(
            max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="tokenizer"
        )

    def run(self, work: Callable[[], T]) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON object file, empty if there is none."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartupError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise StartupError(f"{file} is not a JSON object")
    return content


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _apply_bos(fast: FastTokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Let explicit `add_bos_token` / `add_eos_token` beat what tokenizer.json does.

    That is how `transformers` reads such folders, so token ids agree with it.
    """
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    bos = special.get("bos_token") if config.get("add_bos_token") else None
    eos = special.get("eos_token") if config.get("add_eos_token") else None
    single = " ".join(part for part in (bos and f"{bos}:0", "$A:0", eos and f"{eos}:0") if part)
    named = [(token, fast.token_to_id(token)) for token in (bos, eos) if token]
    if any(token_id is None for _, token_id in named):
        return  # a special token the vocabulary does not have cannot be added
    fast.post_processor = TemplateProcessing(
        single=single, pair=f"{single} $B:1", special_tokens=named
    )
