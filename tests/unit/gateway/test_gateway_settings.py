from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fastserve.common.errors import StartupError
from fastserve.common.settings import load_settings
from fastserve.gateway.auth import ApiKey
from fastserve.gateway.params import Grant
from fastserve.gateway.settings import GatewaySettings


def load(*flags: str) -> GatewaySettings:
    return load_settings(GatewaySettings, "fastserve-gateway", ["--model", "/models/smol", *flags])


def test_defaults() -> None:
    settings = load()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.scheduler == ["127.0.0.1:7070"]
    assert settings.keys() == []
    assert settings.model_name == "smol"


def test_every_flag_is_read(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("from-file\n")
    settings = load(
        *("--host", "0.0.0.0", "--port", "0", "--root-path", "/llm"),
        *("--scheduler", "s0:7070", "--scheduler", "s1:7070"),
        *("--served-model-name", "gpt", "--api-key", "one", "--api-key", "two"),
        *("--api-key-file", str(keys), "--max-body-size", "10", "--max-n", "2"),
        *("--max-prompts", "3", "--ping-interval", "0.5", "--send-timeout", "4"),
        *("--scheduler-timeout", "0", "--reattach-timeout", "0"),
    )
    assert (settings.host, settings.port, settings.root_path) == ("0.0.0.0", 0, "/llm")
    assert settings.scheduler == ["s0:7070", "s1:7070"]
    assert settings.model_name == "gpt"
    assert settings.keys() == [ApiKey("one"), ApiKey("two"), ApiKey("from-file")]
    assert (settings.max_body_size, settings.max_n, settings.max_prompts) == (10, 2, 3)
    assert (settings.ping_interval, settings.send_timeout) == (0.5, 4)
    assert (settings.scheduler_timeout, settings.reattach_timeout) == (0, 0)


def test_schedulers_by_shard() -> None:
    assert load().addresses() == {"0": ["127.0.0.1:7070"]}
    names = ("blue=a:1", "b:2", "blue=unix:/run/x=y", "unix:/run/x=y")
    settings = load(*(f"--scheduler={name}" for name in names))
    assert settings.addresses() == {
        "blue": ["a:1", "unix:/run/x=y"],
        "0": ["b:2", "unix:/run/x=y"],
    }


def test_several_values_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_SCHEDULER", '["a:1", "b:2"]')
    monkeypatch.setenv("FASTSERVE_API_KEY", '["secret"]')
    assert load().scheduler == ["a:1", "b:2"]
    assert load().keys() == [ApiKey("secret")]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--port", "-1"], "port"),
        (["--port", "65536"], "port"),
        (["--port", "http"], "port"),
        (["--max-body-size", "0"], "max_body_size"),
        (["--max-n", "0"], "max_n"),
        (["--max-prompts", "0"], "max_prompts"),
        (["--ping-interval", "0"], "ping_interval"),
        (["--send-timeout", "0"], "send_timeout"),
        (["--scheduler-timeout", "-1"], "scheduler_timeout"),
        (["--reattach-timeout", "-1"], "reattach_timeout"),
        (["--api-key", " "], "api_key"),
        (["--scheduler", ""], "scheduler"),
    ],
)
def test_wrong_settings_are_named(flags: list[str], named: str) -> None:
    with pytest.raises(StartupError, match=named):
        load(*flags)


def test_a_scheduler_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_SCHEDULER", "[]")
    with pytest.raises(StartupError, match="scheduler"):
        load()


def test_the_model_is_needed() -> None:
    with pytest.raises(StartupError, match="model: Field required"):
        load_settings(GatewaySettings, "fastserve-gateway", [])


def test_an_error_about_a_key_does_not_tell_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_API_KEY", '["the-secret", " "]')
    with pytest.raises(StartupError, match="a key is empty") as caught:
        load()
    assert "the-secret" not in str(caught.value)


def test_keys_are_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    settings = load("--api-key", "the-secret")
    with caplog.at_level(logging.INFO):
        logging.getLogger().info("%s %r %s", settings, settings, settings.effective())
    assert "the-secret" not in caplog.text
    assert "api_key" in caplog.text


def test_key_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# keys of team A\n\n  first  \r\nsecond#with-hash\n   # old\nthird")
    keys = load("--api-key-file", str(file)).keys()
    assert keys == [ApiKey("first"), ApiKey("second#with-hash"), ApiKey("third")]


def test_key_file_with_properties(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    lines = ["a tenant=acme class=default weight=2  # Acme", "b tenant=acme", "b tenant=acme", "c"]
    file.write_text("\n".join(lines))
    assert load("--api-key-file", str(file), "--api-key", "flag").keys() == [
        ApiKey("flag"),
        ApiKey("a", Grant("acme", "default", 2.0)),
        ApiKey("b", Grant("acme")),
        ApiKey("c"),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("one\ntwo class=gold\n", "line 2: class must be one of"),
        ("one tenant=a\none tenant=b\n", "line 2: the key was given before"),
    ],
)
def test_a_wrong_line_of_a_key_file_is_named(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(StartupError, match=words) as caught:
        load("--api-key-file", str(file)).keys()
    assert "one" not in str(caught.value).replace("one of", "").replace(str(file), "")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"# only a comment\n"])
def test_a_key_file_without_a_key_does_not_open_the_door(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(StartupError, match="holds no key") as caught:
        load("--api-key-file", str(file)).keys()
    assert str(file) in str(caught.value)


def test_a_key_file_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    for file in (tmp_path / "none", tmp_path, binary):
        with pytest.raises(StartupError, match="cannot be read") as caught:
            load("--api-key-file", str(file)).keys()
        assert str(file) in str(caught.value)


def test_model_name_of_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm").mkdir()
    monkeypatch.chdir(tmp_path / "smollm")
    settings = load_settings(GatewaySettings, "fastserve-gateway", ["--model", "."])
    assert settings.model_name == "smollm"
