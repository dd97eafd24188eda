"""Answers as OpenAI's API shapes them: whole or in chunks, for chat and for text completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import orjson

from fastserve.gateway.detokenizer import TokenPieces
from fastserve.gateway.generation import Delta, ScoredToken

Json = dict[str, Any]

_MARK: Final = "\0"  # found again in a chunk, after which nothing else of a request's own comes
_UNLIKELY: Final = -9999.0  # stands for minus infinity, which JSON does not have


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, from the prefix cache

    def json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Head(NamedTuple):
    """What all parts of an answer have in common."""

    response_id: str
    created: int  # Unix time
    model: str
    service_tier: str | None  # None: the request did not ask


class Collected:
    """All of one choice."""

    def __init__(self) -> None:
        self.text = ""
        self.scored: list[ScoredToken] = []
        self.finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.scored += delta.scored
        self.finish_reason = delta.finish_reason


class AnswerFormat(ABC):
    """Makes the JSON of one answer. `chunk` remembers which choices have begun."""

    _object: str
    _chunk_object: str

    def __init__(self, head: Head, pieces: TokenPieces, *, logprobs: int | None) -> None:
        """`logprobs`: how many of the likeliest tokens are shown; None: no log-probabilities."""
        self._head = head
        self._pieces = pieces
        self._top = logprobs
        self._begun: set[int] = set()
        # What stands before and after the text in a chunk with text alone, by choice.
        self._frames: dict[tuple[int, bool], tuple[bytes, bytes]] = {}

    def resume(self, choices: Sequence[int]) -> None:
        """The client has the beginning of these already."""
        self._begun.update(choices)

    def whole(self, choices: Sequence[Collected], usage: Usage) -> bytes:
        body = self._body(self._object)
        body["choices"] = [self._choice(index, choice) for index, choice in enumerate(choices)]
        body["usage"] = usage.json()
        return orjson.dumps(body)

    def chunk(self, delta: Delta, *, with_usage: bool) -> bytes | None:
        """None if there is nothing to show yet. `with_usage`: a usage chunk will follow."""
        if not delta.scored and delta.finish_reason is None:
            if not delta.text:
                return None
            if delta.choice in self._begun:
                return self._framed(delta, with_usage=with_usage)
        return self._chunk(delta, with_usage=with_usage)

    def _framed(self, delta: Delta, *, with_usage: bool) -> bytes:
        """`_chunk` for all chunks that differ in their text alone."""
        key = delta.choice, with_usage
        frame = self._frames.get(key)
        if frame is None:
            chunk = self._chunk(delta._replace(text=_MARK), with_usage=with_usage)
            before, _, after = chunk.rpartition(orjson.dumps(_MARK))
            frame = self._frames[key] = before, after
        return b"%b%b%b" % (frame[0], orjson.dumps(delta.text), frame[1])

    def _chunk(self, delta: Delta, *, with_usage: bool) -> bytes:
        body = self._body(self._chunk_object)
        body["choices"] = [self._chunk_choice(delta, first=delta.choice not in self._begun)]
        self._begun.add(delta.choice)
        if with_usage:
            body["usage"] = None
        return orjson.dumps(body)

    def usage_chunk(self, usage: Usage) -> bytes:
        return orjson.dumps(
            {**self._body(self._chunk_object), "choices": [], "usage": usage.json()}
        )

    def _body(self, kind: str) -> Json:
        body: Json = {
            "id": self._head.response_id,
            "object": kind,
            "created": self._head.created,
            "model": self._head.model,
        }
        if self._head.service_tier is not None:
            body["service_tier"] = self._head.service_tier
        return body

    @abstractmethod
    def _choice(self, index: int, choice: Collected) -> Json: ...

    @abstractmethod
    def _chunk_choice(self, delta: Delta, *, first: bool) -> Json: ...


class ChatFormat(AnswerFormat):
    """POST /v1/chat/completions."""

    _object = "chat.completion"
    _chunk_object = "chat.completion.chunk"

    def _choice(self, index: int, choice: Collected) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.scored),
            "finish_reason": choice.finish_reason,
        }

    def _chunk_choice(self, delta: Delta, *, first: bool) -> Json:
        content: Json = {"role": "assistant"} if first else {}
        if delta.text or first:
            content["content"] = delta.text
        return {
            "index": delta.choice,
            "delta": content,
            "logprobs": self._logprobs(delta.scored) if delta.scored else None,
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, scored: Sequence[ScoredToken]) -> Json | None:
        if self._top is None:
            return None
        return {"content": [self._token(token) for token in scored], "refusal": None}

    def _token(self, token: ScoredToken) -> Json:
        scores = token.scores
        tops = zip(scores.top_ids, scores.top_logprobs, strict=True) if scores else ()
        return {
            **self._one(token.token_id, scores and scores.logprob),
            "top_logprobs": [self._one(token_id, logprob) for token_id, logprob in tops],
        }

    def _one(self, token_id: int, logprob: float | None) -> Json:
        piece = self._pieces[token_id]
        return {"token": token_text(piece), "logprob": _finite(logprob), "bytes": list(piece)}


class CompletionFormat(AnswerFormat):
    """POST /v1/completions."""

    _object = _chunk_object = "text_completion"

    def __init__(
        self,
        head: Head,
        pieces: TokenPieces,
        *,
        logprobs: int | None,
        echoes: Sequence[str] | None,
    ) -> None:
        """`echoes`: the text that each choice begins with; None: its prompt is not repeated."""
        super().__init__(head, pieces, logprobs=logprobs)
        self._echoes = echoes

    def _choice(self, index: int, choice: Collected) -> Json:
        return {
            "index": index,
            "text": self._echo(index) + choice.text,
            "logprobs": self._logprobs(index, choice.scored),
            "finish_reason": choice.finish_reason,
        }

    def _chunk_choice(self, delta: Delta, *, first: bool) -> Json:
        return {
            "index": delta.choice,
            "text": (self._echo(delta.choice) if first else "") + delta.text,
            "logprobs": self._logprobs(delta.choice, delta.scored) if delta.scored else None,
            "finish_reason": delta.finish_reason,
        }

    def _echo(self, index: int) -> str:
        return self._echoes[index] if self._echoes is not None else ""

    def _logprobs(self, index: int, scored: Sequence[ScoredToken]) -> Json | None:
        if self._top is None:
            return None
        before = len(self._echo(index))
        return {
            "text_offset": [before + token.offset for token in scored],
            "token_logprobs": [_finite(t.scores and t.scores.logprob) for t in scored],
            "tokens": [token_text(self._pieces[token.token_id]) for token in scored],
            "top_logprobs": [self._tops(token) for token in scored] if self._top else None,
        }

    def _tops(self, token: ScoredToken) -> Json | None:
        """The likeliest tokens, and the chosen one if it is not among them."""
        scores = token.scores
        if scores is None:
            return None
        ids, logprobs = [*scores.top_ids, token.token_id], [*scores.top_logprobs, scores.logprob]
        return {
            token_text(self._pieces[token_id]): _finite(logprob)
            for token_id, logprob in zip(ids, logprobs, strict=True)
        }


def token_text(piece: bytes) -> str:
    """A token as text; one that is part of a character as `bytes:` and escapes."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _UNLIKELY)
