"""Token ids to text, incrementally and exactly.

A `TokenPieces` knows which bytes each token id stands for; a `Detokenizer` feeds those bytes to an
incremental UTF-8 decoder. So half a character is never emitted, a step costs O(1) whatever came
before, and the text of a stream is the text of the whole: there is no other way to decode here.

Two families of tokenizer decoders are understood:

- `ByteLevel` (GPT-2, Llama 3, Qwen, SmolLM): every character of a token names one byte.
- `Replace`, `ByteFallback`, `Fuse`, `Strip` in this order, each optional (Llama 2, Mistral, Gemma):
  "▁" is a space, `<0xE2>` a byte, and the text loses the space it begins with.

The result equals `tokenizers.Tokenizer.decode(ids, skip_special_tokens=True)` with one exception:
where a run of `<0x..>` tokens is not valid UTF-8, that function turns each byte of the run into
U+FFFD, valid characters included; here every valid character is kept and each broken sequence gives
one U+FFFD, as it does for byte-level tokenizers. A stream cannot take back what it has shown.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from tokenizers import Tokenizer

_UTF8: Final = codecs.getincrementaldecoder("utf-8")
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnsupportedDecoderError(ValueError):
    """The tokenizer decodes in a way that is not known here; the message names it."""


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level token names (the table of GPT-2).

    Printable Latin-1 characters name themselves; the other bytes, in order, the characters from
    U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in table)
    return table | {chr(0x100 + at): byte for at, byte in enumerate(others)}


class _Decoding(NamedTuple):
    """What the decoder of a tokenizer does, as far as it matters for single tokens."""

    byte_level: bool
    replacements: Sequence[tuple[str, str]]
    byte_fallback: bool
    strip: str  # character taken from the beginning of the text, "" for none
    strip_count: int


def _decoding_of(decoder: Any) -> _Decoding:
    if decoder is None:
        raise UnsupportedDecoderError("the tokenizer has no decoder")
    spec: Mapping[str, Any] = json.loads(decoder.__getstate__())
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return _Decoding(True, [], False, "", 0)
    order = ("Replace", "ByteFallback", "Fuse", "Strip")
    known = [order.index(name) for name in names if name in order]
    if len(known) < len(names) or known != sorted(known) or "Replace" not in names:
        raise UnsupportedDecoderError(f"the tokenizer's decoder {' + '.join(names)} is not known")
    replacements = []
    strip, strip_count = "", 0
    for step in steps:
        if step["type"] == "Replace":
            if "String" not in step["pattern"]:
                raise UnsupportedDecoderError("the tokenizer's decoder replaces by a pattern")
            replacements.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Strip":
            if step["stop"] or "Fuse" not in names:
                raise UnsupportedDecoderError("the tokenizer's decoder strips more than the start")
            strip, strip_count = step["content"], step["start"]
    return _Decoding(False, replacements, "ByteFallback" in names, strip, strip_count)


class TokenPieces:
    """The bytes of every token id. Shared by all streams; filled as tokens come up."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `UnsupportedDecoderError`."""
        self._tokenizer = tokenizer
        self.decoding = _decoding_of(tokenizer.decoder)
        self._bytes_of_character = _byte_of_character() if self.decoding.byte_level else {}
        self._special = frozenset(
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        self._cache: dict[int, bytes] = {}

    def is_special(self, token_id: int) -> bool:
        """Whether the token (end of sequence, role marks, ...) stays out of the text."""
        return token_id in self._special

    def __getitem__(self, token_id: int) -> bytes:
        """Bytes of the token, special or not; b"" for an id that is not in the vocabulary."""
        piece = self._cache.get(token_id)
        if piece is None:
            piece = self._cache[token_id] = self._make(token_id)
        return piece

    def _make(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.decoding.byte_level:
            try:
                return bytes([self._bytes_of_character[character] for character in token])
            except KeyError:  # an added token, written as plain text
                return token.encode()
        for old, new in self.decoding.replacements:
            token = token.replace(old, new)
        if self.decoding.byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.encode()


class Detokenizer:
    """The text of one sequence of tokens, piece by piece."""

    __slots__ = ("_decoder", "_pieces", "_strip_left")

    def __init__(self, pieces: TokenPieces, *, continuation: bool = False) -> None:
        """`continuation`: the tokens continue a text, so a space they begin with is kept."""
        self._pieces = pieces
        self._decoder = _UTF8("replace")
        self._strip_left = 0 if continuation else pieces.decoding.strip_count

    def feed(self, token_id: int) -> str:
        """The text that the token completes: "" for a special token or half a character."""
        if self._pieces.is_special(token_id):
            return ""
        return self._stripped(self._decoder.decode(self._pieces[token_id]))

    def feed_all(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete, as if fed one by one."""
        pieces = self._pieces
        kept = [pieces[token_id] for token_id in token_ids if not pieces.is_special(token_id)]
        return self._stripped(self._decoder.decode(b"".join(kept)))

    def flush(self) -> str:
        """At the end: U+FFFD if the tokens end in the middle of a character."""
        return self._stripped(self._decoder.decode(b"", True))

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._pieces.decoding.strip:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text
