"""What a client says to go on with an answer whose connection broke."""

from __future__ import annotations

import pytest

from fastserve.gateway.errors import InvalidRequestError
from fastserve.gateway.params import ANSWER_HEADER, LAST_EVENT_HEADER, resume_of
from fastserve.gateway.schemas import CompletionRequest

STREAM = CompletionRequest.model_validate({"model": "m", "prompt": "Once", "stream": True})
WHOLE = CompletionRequest.model_validate({"model": "m", "prompt": "Once"})
ANSWER = "chatcmpl-" + "0a" * 16 + "-blue.1"


def resume_headers(last: str | None, answer: str = ANSWER) -> dict[str, str]:
    return {ANSWER_HEADER: answer} | ({} if last is None else {LAST_EVENT_HEADER: last})


@pytest.mark.parametrize(
    ("last", "seen"), [(None, [0, 0]), ("-1,-1", [0, 0]), ("4,-1", [5, 0]), ("0,12", [1, 13])]
)
def test_resume_from_the_tokens_seen(last: str | None, seen: list[int]) -> None:
    resume = resume_of(STREAM, resume_headers(last), 2)
    assert resume is not None
    assert (resume.response_id, list(resume.seen)) == (ANSWER, seen)


def test_a_request_without_an_answer_is_a_new_one() -> None:
    assert resume_of(STREAM, {LAST_EVENT_HEADER: "4"}, 1) is None


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        *[
            (resume_headers(last), LAST_EVENT_HEADER)
            for last in ("", "4", "4,", "4,5,6", "4,-2", "4,x", "4, 5", "4,5\n", "4," + "9" * 10)
        ],
        *[
            (resume_headers("4,5", answer), ANSWER_HEADER)
            for answer in ("", "chatcmpl", ANSWER[:41], f"{ANSWER}/", ANSWER.upper(), f"{ANSWER}\n")
        ],
    ],
)
def test_bad_resume_headers(headers: dict[str, str], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        resume_of(STREAM, headers, 2)
    assert caught.value.param == param


def test_only_streams_are_resumed() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        resume_of(WHOLE, resume_headers("4"), 1)
    assert caught.value.param == "stream"
