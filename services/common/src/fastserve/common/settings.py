"""Settings of a service: flag over environment over file over default.

A service subclasses `ServiceSettings`; every field becomes a flag (`--max-num-seqs`), an
environment variable (`FASTSERVE_MAX_NUM_SEQS`, nested fields by `__`) and a key of the YAML file
given by `--config` or `FASTSERVE_CONFIG`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from fastserve.common.errors import StartupError

_URL_PASSWORD = re.compile(r"(\w+://[^:/@\s]*:)[^@\s]+(?=@)|([?&]password=)[^&\s]+")


class ServiceSettings(BaseSettings):
    """Fields common to all services."""

    model_config = SettingsConfigDict(
        env_prefix="FASTSERVE_",
        env_nested_delimiter="__",
        env_ignore_empty=True,
        extra="ignore",  # the environment and the file are shared by all services
        frozen=True,
    )

    flag_aliases: ClassVar[dict[str, str]] = {}  # field -> another name of its flag

    config: Path | None = Field(default=None, description="YAML file with settings")
    log_level: str = Field(default="info", description="debug, info, warning or error")
    metrics_host: str = Field(default="127.0.0.1", description="address of the metrics endpoint")
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="port of the metrics endpoint (0: any free one)"
    )
    ready_file: Path | None = Field(
        default=None, description="written once the service is ready: JSON with pid and ports"
    )
    shutdown_timeout: float = Field(
        default=10.0, ge=0, description="seconds that work under way has to end after SIGTERM"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings

    def effective(self) -> dict[str, Any]:
        """The settings in force, secrets masked, for the log at start."""
        values = self.model_dump(mode="json")
        return {
            key: _URL_PASSWORD.sub(r"\1\2***", value) if isinstance(value, str) else value
            for key, value in values.items()
        }


SettingsT = TypeVar("SettingsT", bound=ServiceSettings)


def load_settings(
    settings_cls: type[SettingsT], prog: str, argv: Sequence[str] | None = None
) -> SettingsT:
    """Read flags, environment and file.

    Raises `StartupError` with one line per wrong setting. `--help` prints and exits.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    file = _config_file(arguments)
    aliases = settings_cls.flag_aliases

    class Sources(settings_cls):  # type: ignore[misc, valid-type]
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *sources: Any, **named: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            flags: CliSettingsSource[Any] = CliSettingsSource(
                settings_cls,
                cli_prog_name=prog,
                cli_parse_args=arguments,
                cli_kebab_case=True,
                cli_implicit_flags=True,
                cli_hide_none_type=True,
                cli_avoid_json=True,
                cli_shortcuts=aliases,
            )
            chain: list[PydanticBaseSettingsSource] = [flags, named["env_settings"]]
            if file is not None:
                chain.append(YamlConfigSettingsSource(settings_cls, yaml_file=file))
            return tuple(chain)

    Sources.__doc__ = settings_cls.__doc__
    try:
        loaded = Sources()
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in item['loc']) or 'settings'}: {item['msg']}"
            for item in error.errors()
        ]
        raise StartupError("; ".join(lines)) from error
    except (SettingsError, yaml.YAMLError, OSError) as error:
        raise StartupError(str(error)) from error
    # Hand back the plain class: the subclass above exists only to carry the sources.
    return settings_cls.model_construct(
        **{name: getattr(loaded, name) for name in loaded.__class__.model_fields}
    )


def _config_file(arguments: list[str]) -> Path | None:
    """The settings file has to be known before the other sources are read."""
    name = os.environ.get("FASTSERVE_CONFIG")
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            name = arguments[index + 1]
        elif argument.startswith("--config="):
            name = argument.removeprefix("--config=")
    if not name:
        return None
    path = Path(name)
    if not path.is_file():
        raise StartupError(f"settings file {path} does not exist")
    return path
