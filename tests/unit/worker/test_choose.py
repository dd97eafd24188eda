"""Which way a model runs: kernels or PyTorch, number formats."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve.common.errors import StartupError
from fastserve.worker.model import choose as module
from fastserve.worker.model.choose import choose
from fastserve.worker.model.config import GEMMA, OPT, Experts, ModelConfig
from fastserve.worker.native import build
from fastserve.worker.native.build import NativeError, levels, library
from support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(folder, num_hidden_layers=1)
    return ModelConfig.from_folder(folder)


def test_a_cpu_with_kernels_takes_bfloat16_unless_told_otherwise(config: ModelConfig) -> None:
    way = choose(config, device="cpu", threads=3)
    assert (way.int8, way.dtype, way.threads) == (False, torch.bfloat16, 3)
    assert way.library is not None
    assert way.description == f"bfloat16, {way.library.level} kernels, 3 threads"
    assert choose(config, device="cpu", dtype="float32").dtype is torch.float32
    int8 = choose(config, device="cpu", quantization="int8", threads=1)
    assert (int8.int8, int8.dtype) == (True, torch.bfloat16)
    assert int8.description.startswith("int8 weights, bfloat16 KV cache")


def test_without_kernels_float32_in_torch(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise NativeError("no C++ compiler is installed")

    monkeypatch.setattr(module, "best_library", none)
    way = choose(config, device="cpu")
    assert (way.library, way.int8, way.dtype) == (None, False, torch.float32)
    with pytest.raises(StartupError, match="no C\\+\\+ compiler"):
        choose(config, device="cpu", cpu_kernels="native")


def test_what_the_kernels_do_not_cover_runs_in_torch(config: ModelConfig) -> None:
    assert choose(config, device="cpu", block_size=8).library is None
    with pytest.raises(StartupError, match="block size of 8"):
        choose(config, device="cpu", block_size=8, cpu_kernels="native")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": OPT}, "OPT is not of the Llama family"),
        ({"architecture": GEMMA}, "Gemma has another activation"),
        ({"experts": Experts(4, 2, 16, True, ())}, "a mixture of experts"),
    ],
)
def test_families_without_kernels_run_in_torch(
    config: ModelConfig, changes: dict[str, Any], reason: str
) -> None:
    other = replace(config, **changes)
    assert choose(other, device="cpu").library is None
    with pytest.raises(StartupError, match=reason):
        choose(other, device="cpu", cpu_kernels="native")


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ({"quantization": "int4"}, "quantization 'int4'"),
        ({"cpu_kernels": "mkl"}, "cpu_kernels 'mkl'"),
        ({"dtype": "float16"}, "unusably slow"),
        (
            {"cpu_kernels": "torch", "quantization": "int8", "dtype": "bfloat16"},
            "computes in float32",
        ),
    ],
)
def test_wrong_names_and_combinations(
    config: ModelConfig, names: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(StartupError, match=sentence):
        choose(config, device="cpu", **names)


# --- building ------------------------------------------------------------------------------------


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of one line, in a folder of their own, and an empty cache."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build, "_SOURCES", sources)
    monkeypatch.setenv("FASTSERVE_CACHE_DIR", str(tmp_path / "cache"))
    return sources


def test_a_library_is_built_once_and_anew_when_the_sources_change(nothing_built: Path) -> None:
    first = library(levels()[0])
    assert first.parent == nothing_built.parent / "built"
    assert library(levels()[0]) == first
    (nothing_built / "one.cpp").write_text('extern "C" int one() { return 2; }\n')
    assert library(levels()[0]) != first
    assert not list(first.parent.glob(".building-*"))


def test_no_compiler_and_a_broken_one(
    nothing_built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeError, match="no C\\+\\+ compiler is installed"):
        library(levels()[0])
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal error: no space left' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NativeError, match="no space left"):
        library(levels()[0])
    assert not list(tmp_path.rglob("*.so"))
