from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, SecretStr

from fastserve.common.errors import StartupError
from fastserve.common.settings import ServiceSettings, load_settings


class Example(ServiceSettings):
    """An example service."""

    model: str = Field(description="which model")
    max_num_seqs: int = Field(default=3, ge=1, description="rows")
    api_key: list[SecretStr] = Field(default=[], description="keys")
    redis_url: str = Field(default="", description="where Redis is")


def load(*argv: str) -> Example:
    return load_settings(Example, "example", argv)


def test_flag_beats_environment_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: from-file\nmax_num_seqs: 7\n")
    assert load("--model", "m").max_num_seqs == 3
    assert load("--config", str(file)).max_num_seqs == 7
    monkeypatch.setenv("FASTSERVE_MAX_NUM_SEQS", "8")
    assert load("--config", str(file)).max_num_seqs == 8
    assert load("--config", str(file), "--max-num-seqs", "9").max_num_seqs == 9
    assert load("--config", str(file)).model == "from-file"


def test_config_file_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: from-file\n")
    monkeypatch.setenv("FASTSERVE_CONFIG", str(file))
    assert load().model == "from-file"


def test_missing_setting_and_wrong_value_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match=r"model: Field required"):
        load()
    with pytest.raises(StartupError, match=r"max_num_seqs: .*greater than or equal to 1"):
        load("--model", "m", "--max-num-seqs", "0")
    monkeypatch.setenv("FASTSERVE_MAX_NUM_SEQS", "many")
    with pytest.raises(StartupError, match="max_num_seqs"):
        load("--model", "m")


def test_settings_file_that_is_missing_or_broken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="does not exist"):
        load("--config", str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [")
    with pytest.raises(StartupError):
        load("--config", str(broken))


def test_unknown_flag_exits_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        load("--model", "m", "--no-such-flag", "1")
    assert exit_info.value.code == 2
    assert "--no-such-flag" in capsys.readouterr().err


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        load("--help")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--model", "--max-num-seqs", "--metrics-port", "--ready-file", "--config"):
        assert flag in text


def test_secrets_are_masked_in_the_effective_settings() -> None:
    settings = load(
        "--model", "m", "--api-key", "sk-one", "--redis-url", "redis://user:hunter2@host:1/0"
    )
    assert settings.api_key[0].get_secret_value() == "sk-one"
    text = str(settings.effective())
    assert "sk-one" not in text
    assert "hunter2" not in text
    assert "redis://user:***@host:1/0" in text


def test_a_password_in_the_query_of_a_url_is_masked() -> None:
    settings = load("--model", "m", "--redis-url", "unix:///run/redis.sock?db=1&password=hunter2")
    assert settings.effective()["redis_url"] == "unix:///run/redis.sock?db=1&password=***"
