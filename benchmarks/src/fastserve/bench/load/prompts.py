"""Prompts: those of a file, or made to a number of tokens.

A made prompt is a row of words that the model's tokenizer knows as one token each, drawn at random,
so that no two requests share a beginning that a prefix cache could use. What the template and the
mark of the beginning add is measured with one short request. Whether it came out exactly is told by
the server's own count of each request.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from fastserve.bench.arrivals import LoadError
from fastserve.bench.load.http import RequestError
from fastserve.bench.load.target import Target, ask
from fastserve.bench.load.types import LoadRequest

Count = Callable[[str], Awaitable[int]]  # tokens of a text, special ones included

# Common words, each of which begins a word in many tokenizers and is a token of its own.
_COMMON: Final = (
    "the of and to in is was for on that with by this from at his an are were which be had also "
    "has one their first its new after who they two her she been other when time during there "
    "into school more years over only year most would city some where between later about such "
    "then national made known world under many made up part being used however into second while "
    "these state people team war against number between three through both before early within "
    "family since name same several work government music high film season game county house "
    "public day long church group end home life record history local water road small area even"
)
WORDS: Final = tuple(dict.fromkeys(_COMMON.split()))
_OF_WORDS: Final = (
    "prompt words, not tokens: the server has no /tokenize, and no --tokenizer is given"
)


class PromptError(LoadError):
    """Prompts that cannot be had; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class FilePrompt:
    """A line of a prompt file; output_tokens None: not given there."""

    text: str
    output_tokens: int | None


def read_prompts(path: Path) -> list[FilePrompt]:
    """JSON lines with the field `prompt`, perhaps `output_tokens`. Raises `PromptError`."""
    found = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found.append(_line(line, f"{path}, line {number}"))
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PromptError(f"{path} is not a text file") from None
    if not found:
        raise PromptError(f"{path} holds no prompt")
    return found


def _line(line: str, where: str) -> FilePrompt:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{where} is not JSON: {error}") from None
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text:
        raise PromptError(f"{where}: the field prompt must be a text")
    tokens = row.get("output_tokens")
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise PromptError(
            f"{where}: output_tokens must be a whole number from 1 on, not {tokens!r}"
        )
    return FilePrompt(text, tokens)


class PromptMaker:
    """Texts of a given number of tokens. `exact`: how far that goes, in words."""

    def __init__(self, words: Sequence[str], overhead: int, exact: str) -> None:
        """`overhead`: tokens of a prompt beside its words."""
        self._words = words
        self._overhead = overhead
        self.exact = exact

    def make(self, tokens: int, rng: np.random.Generator) -> str:
        """At least one word, however few tokens are asked for."""
        count = max(1, tokens - self._overhead)
        drawn = rng.integers(len(self._words), size=count)
        return "".join([f" {self._words[at]}" for at in drawn.tolist()])


async def prompt_maker(target: Target, tokenizer: Path | None) -> PromptMaker:
    """Made for the tokenizer of the server, or that of a folder. Raises `PromptError`."""
    if tokenizer is not None:
        count, whose = _local(tokenizer), f"the tokenizer of {tokenizer}"
    else:
        found = await _remote(target)
        if found is None:
            return PromptMaker(WORDS, 0, _OF_WORDS)
        count, whose = found, "the server's /tokenize"
    words = await single_tokens(WORDS, count)
    if not words:
        raise PromptError(f"{whose} knows no word as one token: give texts with --prompts")
    overhead = await _overhead(target, words[0])
    if overhead is None:
        return PromptMaker(words, 0, f"by {whose}, without what the server adds to a prompt")
    return PromptMaker(words, overhead, f"by {whose}")


async def local_maker(tokenizer: Path) -> PromptMaker:
    """Made without a server, for several that share a tokenizer. Raises `PromptError`."""
    count, whose = _local(tokenizer), f"the tokenizer of {tokenizer}"
    words = await single_tokens(WORDS, count)
    if not words:
        raise PromptError(f"{whose} knows no word as one token")
    return PromptMaker(words, await count(f" {words[0]}") - 1, f"by {whose}")


async def single_tokens(words: Sequence[str], count: Count) -> list[str]:
    """Those that are one token each in a row of them."""
    words = list(dict.fromkeys(words))
    base = await count(f" {words[0]}")
    if await count("".join(f" {word}" for word in words)) == base + len(words) - 1:
        return words
    found = []
    for word in words:
        once, twice = await count(f" {word}"), await count(f" {word} {word}")
        if twice - once == 1:
            found.append(word)
    return found


async def _remote(target: Target) -> Count | None:
    """POST /tokenize as vLLM and FastServe have it (prompt), or llama.cpp (content)."""
    http = target.http
    for fields in ({"model": target.model, "prompt": ""}, {"content": "", "add_special": True}):
        name = "prompt" if "prompt" in fields else "content"
        try:
            reply = await ask(http, "POST", "/tokenize", {**fields, name: " the"})
        except RequestError:
            continue
        if not reply.get("tokens"):
            continue

        async def count(text: str, fields: dict[str, Any] = fields, name: str = name) -> int:
            try:
                reply = await ask(http, "POST", "/tokenize", {**fields, name: text})
            except RequestError as error:
                raise PromptError(str(error)) from None
            return len(reply["tokens"])

        return count
    return None


def _local(folder: Path) -> Count:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json" if folder.is_dir() else folder
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001  # the only type that the library raises
        raise PromptError(f"--tokenizer: {file} cannot be read: {error}") from None

    async def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    return count


async def _overhead(target: Target, word: str) -> int | None:
    """Tokens of a prompt of one word beside that word; None: the server does not count."""
    request = LoadRequest(0.0, f" {word}", None, 1)
    outcome = await target.run(request, 0.0, time.perf_counter())
    if outcome.error is not None:
        raise PromptError(f"the server does not answer a short request: {outcome.error}")
    return None if outcome.prompt_tokens is None else outcome.prompt_tokens - 1
