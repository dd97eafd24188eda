from __future__ import annotations

import hmac
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.gateway import auth
from fastserve.gateway.auth import ApiKeys

KEYS = ApiKeys(["first-key", "second-key"])


@pytest.mark.parametrize("header", [None, "", "Bearer anything", "Basic eDp5"])
def test_without_keys_every_request_is_accepted(header: str | None) -> None:
    assert ApiKeys([]).check(header) is None


@pytest.mark.parametrize(
    "header",
    [
        "Bearer first-key",
        "Bearer second-key",
        "bearer first-key",
        "BEARER first-key",
        "Bearer   first-key ",
    ],
)
def test_each_key_opens(header: str) -> None:
    assert KEYS.check(header) is None


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (None, "no API key given"),
        ("", "no API key given"),
        ("Bearer", "no API key given"),
        ("Bearer ", "no API key given"),
        ("first-key", "no API key given"),
        ("Basic first-key", "no API key given"),
        ("Bearer third-key", "incorrect API key"),
        ("Bearer first-ke", "incorrect API key"),
        ("Bearer first-key2", "incorrect API key"),
        ("Bearer First-Key", "incorrect API key"),
        ("Bearer first-key second-key", "incorrect API key"),
        ("Bearer €", "incorrect API key"),
    ],
)
def test_everything_else_is_refused(header: str | None, words: str) -> None:
    error = KEYS.check(header)
    assert error is not None
    assert (error.status, error.type, error.code) == (
        401,
        "invalid_request_error",
        "invalid_api_key",
    )
    assert error.headers == {"WWW-Authenticate": "Bearer"}
    assert words in error.message
    assert json.loads(error.body())["error"]["param"] is None


@given(key=st.text(st.characters(min_codepoint=0x21, max_codepoint=0xFF), min_size=1))
def test_no_other_key_opens(key: str) -> None:
    error = KEYS.check(f"Bearer {key}")
    assert (error is None) == (key.strip() in ("first-key", "second-key"))
    if error is not None and len(key) > 8:
        assert key not in error.message


def test_a_key_beyond_ascii_as_the_header_carries_it() -> None:
    """HTTP headers are read as Latin-1; the key was sent as UTF-8."""
    keys = ApiKeys(["schlüssel"])
    assert keys.check("Bearer " + "schlüssel".encode().decode("latin-1")) is None
    assert keys.check("Bearer schlussel") is not None


@pytest.mark.parametrize("key", ["first-key", "second-key", "x", "x" * 10_000])
def test_time_tells_nothing(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every known key is compared, in constant time, whichever one matches."""
    compared: list[tuple[int, int]] = []

    def compare(a: Any, b: Any) -> bool:
        compared.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    class Watched:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(auth, "hmac", Watched)
    KEYS.check(f"Bearer {key}")
    assert compared == [(32, 32)] * 2
