from __future__ import annotations

import hmac
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.gateway import auth
from fastserve.gateway.auth import ApiKey, ApiKeys, parse_key
from fastserve.gateway.errors import InvalidRequestError
from fastserve.gateway.params import Grant

ACME = Grant("acme", "default", 2.0)
KEYS = ApiKeys([ApiKey("first-key"), ApiKey("second-key", ACME)])


def refusal(keys: ApiKeys, header: str | None) -> InvalidRequestError | None:
    try:
        keys.grant(header)
    except InvalidRequestError as error:
        return error
    return None


@pytest.mark.parametrize("header", [None, "", "Bearer anything", "Basic eDp5"])
def test_without_keys_every_request_is_accepted(header: str | None) -> None:
    assert ApiKeys([]).grant(header) == Grant()


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
    assert KEYS.grant(header) == (ACME if "second" in header else Grant())


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
    error = refusal(KEYS, header)
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
    error = refusal(KEYS, f"Bearer {key}")
    assert (error is None) == (key.strip() in ("first-key", "second-key"))
    if error is not None and len(key) > 8:
        assert key not in error.message


def test_a_key_beyond_ascii_as_the_header_carries_it() -> None:
    """HTTP headers are read as Latin-1; the key was sent as UTF-8."""
    keys = ApiKeys([ApiKey("schlüssel")])
    assert refusal(keys, "Bearer " + "schlüssel".encode().decode("latin-1")) is None
    assert refusal(keys, "Bearer schlussel") is not None


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
    refusal(KEYS, f"Bearer {key}")
    assert compared == [(32, 32)] * 2


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("s3cr3t", ApiKey("s3cr3t")),
        ("  s3cr3t  ", ApiKey("s3cr3t")),
        ("with#hash", ApiKey("with#hash")),
        ("s3cr3t tenant=acme", ApiKey("s3cr3t", Grant("acme"))),
        (
            "s3cr3t\tweight=0.5  class=batch tenant=a=b # night jobs",
            ApiKey("s3cr3t", Grant("a=b", "batch", 0.5)),
        ),
        ("", None),
        ("   # s3cr3t tenant=acme", None),
    ],
)
def test_lines_of_a_key_file(line: str, key: ApiKey | None) -> None:
    assert parse_key(line) == key


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("s3cr3t acme", "tenant=NAME"),
        ("s3cr3t owner=acme", "tenant=NAME"),
        ("s3cr3t class=gold", "interactive, default, batch"),
        ("s3cr3t tenant=", "a tenant has"),
        ("s3cr3t weight=0", "weight must be"),
        ("s3cr3t weight=nan", "weight must be"),
        ("s3cr3t weight=1e9", "weight must be"),
        ("s3cr3t weight=much", "weight must be"),
        ("s3cr3t tenant=a tenant=b", "tenant is given twice"),
    ],
)
def test_wrong_properties_are_told_without_the_key(line: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse_key(line)
    assert "s3cr3t" not in str(caught.value)
