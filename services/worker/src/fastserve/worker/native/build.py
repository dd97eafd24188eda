"""Compiles the kernels, once per instruction set, and keeps the libraries.

`python -m fastserve.worker.native.build` compiles what this machine can run (`make setup` does so),
with `--all` every level, for an image that will run on other machines. A worker that finds no
library for its CPU compiles it then. File names carry a digest of the sources, so that a library is
never older than they are.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from fastserve.worker.model.files import cache_folder

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-std=c++20", "-O3", "-Wall", "-Wextra", "-Wno-psabi", "-fPIC", "-shared", "-pthread")
_TIMEOUT_S = 600.0
# A process has to ask Linux for the registers of AMX: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18
# Best first: name, compiler flags, and what /proc/cpuinfo calls the instructions.
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma"})
_X86_LEVELS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "amx": (
        (
            *("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
            *("-mamx-tile", "-mamx-bf16", "-mamx-int8"),
        ),
        _AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
    ),
    "avx512bf16": (
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
        _AVX512 | {"avx512_bf16"},
    ),
    "avx512vnni": (("-march=x86-64-v4", "-mavx512vnni"), _AVX512),
    "avx2": (("-march=x86-64-v3",), frozenset({"avx2", "fma", "bmi2", "f16c", "movbe"})),
}
PORTABLE = "portable"


class NativeError(Exception):
    """There is no library, and none can be built; the sentence says why."""


def all_levels() -> list[str]:
    """The instruction sets of this kind of machine, best first."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return [*(_X86_LEVELS if x86 else ()), PORTABLE]


@cache
def levels() -> list[str]:
    """The instruction sets that this CPU runs and the kernel lets this process use, best first."""
    found: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                found = set(line.partition(":")[2].split())
                break
    if "amx_tile" in found and not _may_use_tiles():
        found.discard("amx_tile")
    return [level for level in all_levels() if level == PORTABLE or _X86_LEVELS[level][1] <= found]


def _may_use_tiles() -> bool:
    """Asks for the tile registers, for all threads of this process. An old kernel refuses."""
    syscall = ctypes.CDLL(None).syscall
    syscall.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_ulong)
    syscall.restype = ctypes.c_long
    return bool(syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)


def library(level: str) -> Path:
    """The compiled library of a level, built now if there is none. Raises `NativeError`."""
    name = f"fastserve-{level}-{_digest(level)}.so"
    # Beside the sources, where an installation puts it; else in the user's cache.
    folders = [_SOURCES.parent / "built", cache_folder() / "native"]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            _compile(level, folder / name)
            return folder / name
    raise NativeError(f"no folder to build in can be written ({', '.join(map(str, folders))})")


def _flags(level: str) -> tuple[str, ...]:
    return (*_FLAGS, *(_X86_LEVELS[level][0] if level in _X86_LEVELS else ()))


def _digest(level: str) -> str:
    digest = hashlib.sha256(f"{platform.machine()} {_flags(level)}".encode())
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _compile(level: str, target: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NativeError(
            "no C++ compiler is installed (g++ or clang++, or the one that $CXX names)"
        )
    # Aside first: another process may build or load the same file.
    descriptor, scratch = tempfile.mkstemp(prefix=".building-", suffix=".so", dir=target.parent)
    os.close(descriptor)
    sources = [str(path) for path in sorted(_SOURCES.glob("*.cpp"))]
    try:
        result = subprocess.run(
            [compiler, *_flags(level), *sources, "-o", scratch],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if "error" in line]
            raise NativeError(f"{compiler} failed: {(lines or ['no message'])[0]}")
        Path(scratch).chmod(0o755)
        Path(scratch).rename(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{compiler} failed: {error}") from error
    finally:
        Path(scratch).unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="fastserve-build-kernels", description="Compile the CPU kernels of the worker."
    )
    parser.add_argument(
        "--all", action="store_true", help="all instruction sets, not only this machine's best"
    )
    arguments = parser.parse_args()
    for level in all_levels() if arguments.all else levels()[:1]:
        try:
            print(library(level))
        except NativeError as error:
            # Not fatal: the worker runs without them, slower, and says so.
            print(f"CPU kernels for {level} are not built: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
