"""How a model is run here: kernels or PyTorch, number formats, threads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import structlog
import torch

from fastserve.common.errors import StartupError
from fastserve.worker.cores import usable_cores
from fastserve.worker.model.backend import choose_device, choose_dtype
from fastserve.worker.model.config import OPT, ModelConfig
from fastserve.worker.model.llama import Model
from fastserve.worker.model.loader import load_model, load_native
from fastserve.worker.model.memory import announced
from fastserve.worker.model.native import NativeModel, why_not_native
from fastserve.worker.model.opt import OptModel, load_opt
from fastserve.worker.native.build import NativeError
from fastserve.worker.native.library import Library, best_library

log = structlog.get_logger(__name__)

AnyModel: TypeAlias = Model | NativeModel | OptModel


@dataclass(frozen=True, slots=True)
class Way:
    """How to run a model. library: the CPU kernels, None for PyTorch. dtype: of the KV cache, and
    of the weights unless they are int8."""

    device: torch.device
    dtype: torch.dtype
    int8: bool
    threads: int
    library: Library | None

    @property
    def description(self) -> str:
        """Such as "int8 weights, bfloat16 KV cache, avx512bf16 kernels, 2 threads"."""
        dtype = str(self.dtype).removeprefix("torch.")
        numbers = f"int8 weights, {dtype} KV cache" if self.int8 else dtype
        if self.device.type == "cuda":
            return f"{numbers}, cuda"
        kernels = f"{self.library.level} kernels" if self.library else "PyTorch"
        return f"{numbers}, {kernels}, {self.threads} threads"


def choose(
    config: ModelConfig,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "none",
    cpu_kernels: str = "auto",
    block_size: int = 16,
    threads: int = 0,
) -> Way:
    """Decide, by the settings of the same names.

    Left to itself a CPU with kernels takes bfloat16, one without float32. int8 is there for the
    asking: faster, less than 1 % of perplexity worse, but close choices between tokens may turn.
    Raises `StartupError` for names that do not exist and for combinations that do not work.
    """
    if quantization not in ("none", "int8"):
        raise StartupError(f"quantization {quantization!r} is not one of none, int8")
    if cpu_kernels not in ("auto", "native", "torch"):
        raise StartupError(f"cpu_kernels {cpu_kernels!r} is not one of auto, native, torch")
    place = choose_device(device)
    if place.type == "cuda":
        if quantization == "int8":
            raise StartupError("quantization int8 is for CPUs")
        return Way(place, choose_dtype(dtype, place), False, threads, None)
    cores = threads or usable_cores()
    library = _kernels(config, cpu_kernels, block_size)
    int8 = quantization == "int8"
    if dtype == "auto" and library is not None:
        dtype = "bfloat16"
    number = choose_dtype(dtype, place)
    if int8 and library is None and number is not torch.float32:
        raise StartupError("int8 without the CPU kernels computes in float32: leave --dtype out")
    return Way(place, number, int8, cores, library)


def _kernels(config: ModelConfig, wanted: str, block_size: int) -> Library | None:
    if wanted == "torch":
        return None
    why = why_not_native(config, block_size)
    if not why:
        try:
            return best_library()
        except NativeError as error:
            why = str(error)
    if wanted == "native":
        raise StartupError(f"the CPU kernels cannot be used: {why}")
    log.warning("without the CPU kernels: PyTorch is several times slower", reason=why)
    return None


def load(folder: Path, way: Way, block_size: int = 16) -> AnyModel:
    """Load a prepared folder. Raises `ModelError`."""
    if way.device.type == "cpu":
        torch.set_num_threads(way.threads)
    config = ModelConfig.from_folder(folder)
    with announced(config, way.dtype, int8=way.int8):
        if config.architecture == OPT:
            return load_opt(folder, way.dtype, way.device, int8=way.int8)
        if way.library is None:
            return load_model(folder, way.dtype, way.device, int8=way.int8)
        return load_native(
            folder,
            way.dtype,
            way.library,
            block_size=block_size,
            threads=way.threads,
            int8=way.int8,
        )
