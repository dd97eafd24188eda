"""Text must be exact however it is cut into tokens; the tokenizers library is the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as FastTokenizer

from fastserve.gateway.detokenizer import Detokenizer, TokenPieces, UnsupportedDecoderError
from fastserve.gateway.tokenizer import Tokenizer

HARD_TEXTS = [
    "👩‍👩‍👧‍👦 family, 🇩🇪🇯🇵 flags, 👍🏽 skin",
    "日本語のテキスト。한국어 中文",
    "  leading and  double  spaces ",
    "e\u0301 a\u0308\u0323 combining, नमस्ते",
    "\t tabs\r\nand\n\n\nlines \u00a0\u2003",
    "\ufffd is a character like any other",
    "مرحبا \u200f עולם",
    "𝕄𝕒𝕥𝕙 𒀀 🀄",
]
TEXTS = st.lists(st.one_of(st.text(), st.sampled_from(HARD_TEXTS)), max_size=4).map("".join)
VOCABULARY = 49_152
TOKEN_IDS = st.lists(st.integers(0, VOCABULARY - 1), max_size=60)


def deltas_of(pieces: TokenPieces, ids: Sequence[int], **options: bool) -> list[str]:
    """What each token brings, and in the end what flush brings."""
    detokenizer = Detokenizer(pieces, **options)
    return [*map(detokenizer.feed, ids), detokenizer.flush()]


def ids_of(tokenizer: FastTokenizer, *tokens: str) -> list[int]:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return [vocabulary[token] for token in tokens]


@settings(deadline=None)
@given(text=TEXTS)
def test_deltas_of_a_text_are_the_text(
    text: str, default_tokenizer: Tokenizer, reference_tokenizer: FastTokenizer
) -> None:
    ids = reference_tokenizer.encode(text, add_special_tokens=False).ids
    deltas = deltas_of(default_tokenizer.pieces, ids)
    assert "".join(deltas) == reference_tokenizer.decode(ids, skip_special_tokens=True)
    assert default_tokenizer.decode(ids) == "".join(deltas)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_come_back_character_by_character(
    text: str, default_tokenizer: Tokenizer
) -> None:
    """Each delta is exactly the characters its token completes: no half one, none late."""
    ids = default_tokenizer.encode(text, add_special_tokens=False)
    detokenizer = default_tokenizer.detokenizer()
    data, shown = b"", ""
    for token_id in ids:
        data += default_tokenizer.pieces[token_id]
        shown += detokenizer.feed(token_id)
        assert shown == data.decode("utf-8", "ignore")
    assert shown == text
    assert detokenizer.flush() == ""


@settings(deadline=None, max_examples=200)
@given(ids=TOKEN_IDS)
def test_deltas_of_random_tokens_are_the_whole_decode(
    ids: list[int], default_tokenizer: Tokenizer, reference_tokenizer: FastTokenizer
) -> None:
    deltas = deltas_of(default_tokenizer.pieces, ids)
    assert "".join(deltas) == reference_tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def byte_tokens(default_tokenizer: Tokenizer) -> dict[int, int]:
    """The tokens that stand for one byte; the vocabulary lacks some that UTF-8 never has."""
    pieces = default_tokenizer.pieces
    tokens = {pieces[token][0]: token for token in range(VOCABULARY) if len(pieces[token]) == 1}
    assert set(range(0x80, 0xC0)) < set(tokens)  # every byte that continues a character
    return tokens


@settings(deadline=None, max_examples=200)
@given(data=st.lists(st.one_of(st.binary(), TEXTS.map(str.encode)), max_size=4).map(b"".join))
def test_invalid_bytes(
    data: bytes,
    byte_tokens: dict[int, int],
    default_tokenizer: Tokenizer,
    reference_tokenizer: FastTokenizer,
) -> None:
    """Tokens of single bytes: any sequence may come out of a model, valid UTF-8 or not."""
    data = bytes(byte for byte in data if byte in byte_tokens)
    ids = [byte_tokens[byte] for byte in data]
    whole = "".join(deltas_of(default_tokenizer.pieces, ids))
    assert whole == data.decode("utf-8", "replace")
    assert whole == reference_tokenizer.decode(ids)


def test_special_tokens_are_no_text(default_tokenizer: Tokenizer) -> None:
    im_start, im_end = 1, 2
    half_emoji, other_half = _halves(default_tokenizer, "🀄")
    deltas = deltas_of(default_tokenizer.pieces, [im_start, *half_emoji, im_end, *other_half])
    assert "".join(deltas) == "🀄"
    assert deltas[0] == ""
    assert default_tokenizer.pieces.is_special(im_end)
    assert default_tokenizer.pieces[im_end] == b"<|im_end|>"  # for log-probabilities


def test_half_a_character_at_the_end_is_one_replacement(default_tokenizer: Tokenizer) -> None:
    first, _ = _halves(default_tokenizer, "🀄")
    deltas = deltas_of(default_tokenizer.pieces, first)
    assert deltas == [""] * len(first) + ["\ufffd"]


def test_half_a_character_shows_once_it_is_broken(default_tokenizer: Tokenizer) -> None:
    first, _ = _halves(default_tokenizer, "🀄")
    (hello,) = default_tokenizer.encode("hello", add_special_tokens=False)
    assert deltas_of(default_tokenizer.pieces, [*first, hello])[-2:] == ["\ufffdhello", ""]


def test_ids_outside_the_vocabulary_are_no_text(default_tokenizer: Tokenizer) -> None:
    assert deltas_of(default_tokenizer.pieces, [VOCABULARY, 2**31]) == ["", "", ""]


def test_added_tokens_of_a_byte_level_tokenizer() -> None:
    """They are plain text, unless each of their characters happens to name a byte."""
    words = ["Ġa", "é", "ðŁ", "Ģ", "Ħ"]
    tokenizer = FastTokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "é"))
    tokenizer.add_tokens(["<think>", "日本 x", "naïve"])
    tokenizer.decoder = decoders.ByteLevel()
    ids = ids_of(tokenizer, *words, "<think>", "日本 x", "naïve")
    assert "".join(deltas_of(TokenPieces(tokenizer), ids)) == tokenizer.decode(ids)
    assert "<think>日本 x" in tokenizer.decode(ids)


def _halves(tokenizer: Tokenizer, character: str) -> tuple[list[int], list[int]]:
    ids = tokenizer.encode(character, add_special_tokens=False)
    assert len(ids) > 1
    return ids[:1], ids[1:]


WORDS = ["▁", "▁Hello", "▁world", "ly", "日", "👍", "a▁b", "<0x", "<0xGG>", "é"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
END = "</s>"


def llama_tokenizer(*, strip: int = 1) -> FastTokenizer:
    """As Llama 2 and Mistral decode: "▁" for a space, `<0x..>` tokens, a space less at first."""
    vocabulary = {token: at for at, token in enumerate([*BYTES, *WORDS])}
    tokenizer = FastTokenizer(models.WordLevel(vocabulary, unk_token="<0x00>"))
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", strip, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


LLAMA_TOKENS = st.one_of(
    st.sampled_from([*WORDS, END]).map(lambda token: [token]),
    st.text(max_size=3).map(lambda text: [f"<0x{byte:02X}>" for byte in text.encode()]),
)


@pytest.mark.parametrize("strip", [0, 1, 2])
@settings(deadline=None)
@given(runs=st.lists(LLAMA_TOKENS, max_size=12))
def test_byte_fallback_as_the_library_decodes_it(strip: int, runs: list[list[str]]) -> None:
    tokenizer = llama_tokenizer(strip=strip)
    ids = ids_of(tokenizer, *itertools.chain(*runs))
    deltas = deltas_of(TokenPieces(tokenizer), ids)
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=True)


def test_byte_fallback_keeps_what_is_valid_in_a_broken_run() -> None:
    tokenizer = llama_tokenizer()
    ids = ids_of(tokenizer, "<0xC3>", "<0xA9>", "<0xE2>", "<0x41>")
    assert deltas_of(TokenPieces(tokenizer), ids) == ["", "é", "", "\ufffdA", ""]


def test_a_continuation_keeps_the_space_it_begins_with() -> None:
    tokenizer = llama_tokenizer()
    ids = ids_of(tokenizer, "▁Hello", "▁world")
    pieces = TokenPieces(tokenizer)
    assert deltas_of(pieces, ids) == ["Hello", " world", ""]
    assert deltas_of(pieces, ids, continuation=True) == [" Hello", " world", ""]


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (None, "no decoder"),
        (decoders.WordPiece(), "WordPiece"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]), r"ByteLevel \+ Fuse"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]), r"Fuse \+ Replace"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 1)]), "strips more"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]), "strips more"),
    ],
)
def test_unknown_decoders_are_refused(decoder: Any, named: str) -> None:
    tokenizer = llama_tokenizer()
    tokenizer.decoder = decoder
    with pytest.raises(UnsupportedDecoderError, match=named):
        TokenPieces(tokenizer)
