"""Pinned requirements of the images, derived from each service's pyproject.toml.

`python docker/lock.py` writes docker/locks/<service>.txt: all that the service needs, directly or
not, in the versions of requirements.txt. `--check` only compares. The environment that runs it says
who needs whom, so it must be the one of `make setup`, on Linux.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "docker" / "locks"
DISTS = {
    "fastserve-proto": "proto",
    "fastserve-common": "services/common",
    "fastserve-gateway": "services/gateway",
    "fastserve-scheduler": "services/scheduler",
    "fastserve-worker": "services/worker",
    "fastserve-kv-offload": "services/kv-offload",
}
SERVICES = ("gateway", "scheduler", "worker", "kv-offload")
BUILD = ("hatchling",)  # what makes wheels of our packages
# Needed by the CUDA builds of torch only, which bring them in exact versions of their own.
_WITH_TORCH = re.compile(r"nvidia-|cuda-|triton$")


class LockError(Exception):
    """The environment or the files do not fit together; the sentence says where."""


# Markers are judged for the interpreter that runs this and for the oldest that an image may have.
_OLDEST = {"python_version": "3.11", "python_full_version": "3.11.0"}


def pins(requirements: Path = ROOT / "requirements.txt") -> dict[str, Requirement]:
    """By canonical name."""
    lines = (line.partition("#")[0].strip() for line in requirements.read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def direct(dist: str) -> list[Requirement]:
    """What a package of ours asks for, its extras included, ours among it followed."""
    project = tomllib.loads((ROOT / DISTS[dist] / "pyproject.toml").read_text())["project"]
    found = []
    extras = project.get("optional-dependencies", {}).values()
    for requirement in map(Requirement, [*project["dependencies"], *chain(*extras)]):
        if requirement.name in DISTS:
            found += direct(requirement.name)
        else:
            found.append(requirement)
    return found


def closure(wanted: Iterable[Requirement], pinned: Mapping[str, Requirement]) -> dict[str, str]:
    """Lines for `wanted` and all they need, by canonical name.

    Raises `LockError` for what is not installed, not pinned, or pinned to what nobody can use.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = list(wanted)
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        pin = pinned.get(name)
        if pin is None:
            raise LockError(f"{name} is needed, but requirements.txt does not pin it")
        version = str(pin.specifier).removeprefix("==")
        if not requirement.specifier.contains(version, prereleases=True):
            raise LockError(f"{requirement} is needed, requirements.txt has {version}")
        found[name] = f"{name}=={version}" + (f"; {pin.marker}" if pin.marker else "")
        if pin.marker is not None and not pin.marker.evaluate():
            continue  # not installed here; what has a marker in requirements.txt needs nothing
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError as error:
            raise LockError(f"{name} is not installed: run `make setup`") from error
        for need in map(Requirement, needs):
            if need.marker is not None and not any(
                need.marker.evaluate({"extra": extra, **python})
                for extra in ("", *extras)
                for python in ({}, _OLDEST)
            ):
                continue
            if not (name == "torch" and _WITH_TORCH.match(need.name)):
                todo.append(need)
    return found


def lock(service: str) -> str:
    """Text of the lock file of a service, or of "build". Raises `LockError`."""
    wanted = map(Requirement, BUILD) if service == "build" else direct(f"fastserve-{service}")
    lines = closure(wanted, pins())
    found = [lines[name] for name in sorted(lines)]
    return "\n".join(["# Written by docker/lock.py; do not edit.", *found, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the lock files of the images.")
    parser.add_argument("--check", action="store_true", help="only compare; status 1 if stale")
    check = parser.parse_args().check
    stale = []
    try:
        for name in (*SERVICES, "build"):
            path, text = LOCKS / f"{name}.txt", lock(name)
            if check and (not path.exists() or path.read_text() != text):
                stale.append(path)
            elif not check:
                LOCKS.mkdir(exist_ok=True)
                path.write_text(text)
    except LockError as error:
        print(f"docker/lock.py: {error}", file=sys.stderr)
        return 1
    for path in stale:
        print(f"{path.relative_to(ROOT)} is stale: run python docker/lock.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
