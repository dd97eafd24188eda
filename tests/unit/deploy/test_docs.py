"""What the documentation names exists: files, make targets, commands, flags, variables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from fastserve.cli.main import app
from support import services

ROOT = Path(__file__).parents[3]
PAGES = sorted([ROOT / "README.md", ROOT / "helm" / "README.md", *(ROOT / "docs").glob("*.md")])
# Flags of other programs: docker, kubectl, helm, docker-compose, mypy.
OTHERS = {
    "--build-arg",
    "--cascade",
    "--detach",
    "--from-literal",
    "--strict",
    "--volumes",
    "--wait",
}
# Variables that tests and commands read, beside those of the services.
VARIABLES = {"FASTSERVE_TEST_TRACE", "FASTSERVE_TEST_PROMPTS"}

_LINK = re.compile(r"\]\(([^)#\s]+)")
_CODE = re.compile(r"^```\w*\n(.*?)^```|`([^`]+)`|^ {4,}(\S[^\n]*)$", re.MULTILINE | re.DOTALL)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_VARIABLE = re.compile(r"\bFASTSERVE_[A-Z_]+\b")
_COMMAND = re.compile(r"(?<!the )\bfastserve ([a-z]+)(?: ([a-z]+))?")
_MAKE = re.compile(r"\bmake ([a-z][a-z-]*)")
_FILE = re.compile(r"(?:docs|helm|tests|services|benchmarks|cli|proto|docker)/[\w./-]+\.\w+")
_LITERAL = re.compile(r"\"(--[a-z][a-z0-9-]*)[\"=/]")


def code(text: str) -> str:
    """What stands in backticks and code blocks, a line each."""
    return "\n".join(part for match in _CODE.finditer(text) for part in match.groups() if part)


def _subcommands(group: TyperGroup) -> Iterator[tuple[str, TyperCommand]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from ((f"{name} {inner}", found) for inner, found in _subcommands(command))
        else:
            assert isinstance(command, TyperCommand)
            yield name, command


@cache
def commands() -> dict[str, TyperCommand]:
    """Subcommands of `fastserve` by their words."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    return dict(_subcommands(group))


@cache
def flags() -> set[str]:
    """Of every service, command and script."""
    known = {"--help", *OTHERS}
    for settings in services.SETTINGS.values():
        for name in (*settings.model_fields, *settings.flag_aliases.values()):
            words = name.replace("_", "-")
            known |= {f"--{words}", f"--no-{words}"}
    for command in commands().values():
        for parameter in command.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
    scripts = [*ROOT.glob("*/src/**/*.py"), *ROOT.glob("services/*/src/**/*.py")]
    for script in (*scripts, *ROOT.glob("*/*.py")):
        known |= set(_LITERAL.findall(script.read_text()))
    return known


@cache
def variables() -> set[str]:
    known = VARIABLES | services.library_variables()
    for service in services.SETTINGS:
        known |= services.settings_variables(service)
    for command in commands().values():
        for parameter in command.params:
            known |= {str(parameter.envvar)}
    return known


def unknown(page: str, folder: Path) -> list[str]:
    """What a page names and nobody has. `folder`: where it lies, for its links."""
    shown = code(page)
    wrong = [
        link for link in _LINK.findall(page) if "://" not in link and not (folder / link).exists()
    ]
    wrong += [name for name in _FILE.findall(shown) if not (ROOT / name).exists()]
    wrong += [flag for flag in _FLAG.findall(shown) if flag not in flags()]
    wrong += [name for name in _VARIABLE.findall(shown) if name not in variables()]
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wrong += [f"make {target}" for target in _MAKE.findall(shown) if target not in targets]
    for words in _COMMAND.findall(shown):
        if words[0] not in commands() and " ".join(filter(None, words)) not in {
            *commands(),
            "bench",
        }:
            wrong.append(f"fastserve {' '.join(words)}".strip())
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert unknown(page.read_text(), page.parent) == []


@pytest.mark.parametrize(
    ("page", "wrong"),
    [
        ("see [there](nowhere.md)", "nowhere.md"),
        ("`fastserve up --no-such-flag`", "--no-such-flag"),
        ("    fastserve go", "fastserve go"),
        ("    fastserve bench nothing", "fastserve bench nothing"),
        ("```\nmake everything\n```", "make everything"),
        ("set `FASTSERVE_NOTHING`", "FASTSERVE_NOTHING"),
        ("`tests/unit/test_nothing.py`", "tests/unit/test_nothing.py"),
    ],
)
def test_what_does_not_exist_is_noticed(page: str, wrong: str) -> None:
    assert unknown(page, ROOT) == [wrong]
