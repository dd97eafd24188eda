"""Options of `fastserve bench serve` that cannot be: told before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastserve.bench.load.http import Address
from fastserve.cli.main import app


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("-r", "1", "-c", "1"), "exclude each other"),
        (("-r", "0"), "greater than 0"),
        (("-c", "0"), "--concurrency"),
        (("-c", "1.5"), "--concurrency"),
        (("--arrivals", "trace"), "--trace"),
        (("--arrivals", "never"), "unknown"),
        (("--endpoint", "poetry"), "--endpoint"),
        (("--workload", "nothing"), "unknown"),
        (("--workload", "alpaca", "--prompts", "x"), "--prompts"),
        (("--prompts", "/nothing/there"), "cannot be read"),
        (("--header", "nonsense"), "--header"),
        (("--header", "X: a\r\nY: b"), "--header"),
        (("--tenant", "a", "--tenants", "2"), "exclude each other"),
        (("--extra-body", "[]"), "--extra-body"),
        (("--extra-body", "{"), "--extra-body"),
        (("--slo-ttft", "0"), "--slo-ttft"),
        (("--slo-tpot", "nan"), "--slo-tpot"),
        (("--timeout", "inf"), "--timeout"),
        (("-n", "0"), "--requests"),
        (("ftp://host",), "ftp://host"),
    ],
)
def test_bad_values_are_one_sentence_and_status_2(flags: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", "serve", *flags])
    assert result.exit_code == 2, result.output
    assert said in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_a_folder_that_cannot_be_made_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["bench", "serve", "--out", str(tmp_path / "file/out")])
    assert result.exit_code == 2 and "--out" in result.stderr


def test_a_server_that_is_not_there_is_status_1() -> None:
    result = CliRunner().invoke(app, ["bench", "serve", "http://127.0.0.1:9"])
    assert result.exit_code == 1 and "no connection" in result.stderr


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://host/v1/", "http://host"),
        ("host:80/prefix/v1", "http://host:80/prefix"),
        ("https://host/prefix", "https://host/prefix"),
    ],
)
def test_addresses(url: str, base: str) -> None:
    address = Address(url)
    assert address.url == base
    head = address.head("GET", "/v1/models", {"A": "b"}, 0)
    path = base.split("/", 3)[3:]
    prefix = f"/{path[0]}" if path else ""
    assert head.startswith(f"GET {prefix}/v1/models HTTP/1.1\r\nHost: ".encode())
