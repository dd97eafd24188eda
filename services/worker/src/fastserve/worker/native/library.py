"""The C interface of the kernels (csrc/api.cpp), as ctypes sees it."""

from __future__ import annotations

import ctypes as c
from enum import IntEnum
from functools import cache
from typing import Any

import structlog

from fastserve.worker.native.build import NativeError, levels, library

log = structlog.get_logger(__name__)


class Dtype(IntEnum):
    """Number formats of the kernels."""

    F32 = 0
    BF16 = 1
    INT8 = 2


class Weight(IntEnum):
    """Which weight of a layer (or of the model) is meant."""

    QKV = 0
    OUTPUT = 1
    GATE_UP = 2
    DOWN = 3
    HEAD = 4
    INPUT_NORM = 5
    POST_NORM = 6
    QUERY_NORM = 7
    KEY_NORM = 8
    FINAL_NORM = 9


class Shape(c.Structure):
    """Sizes and formats of a model; model.h explains the fields."""

    _fields_ = (
        ("layers", c.c_int32),
        ("hidden", c.c_int32),
        ("heads", c.c_int32),
        ("kv_heads", c.c_int32),
        ("dim", c.c_int32),
        ("intermediate", c.c_int32),
        ("vocab", c.c_int32),
        ("block_size", c.c_int32),
        ("window", c.c_int32),
        ("weights", c.c_int32),
        ("kv", c.c_int32),
        ("threads", c.c_int32),
        ("epsilon", c.c_float),
    )


class NativeBatch(c.Structure):
    """One iteration; model.h explains the fields."""

    _fields_ = (
        ("tokens", c.c_int32),
        ("rows", c.c_int32),
        ("logit_rows", c.c_int32),
        ("token_ids", c.c_void_p),
        ("query_lens", c.c_void_p),
        ("context_lens", c.c_void_p),
        ("block_tables", c.c_void_p),
        ("table_starts", c.c_void_p),
        ("wanted", c.c_void_p),
        ("kv", c.c_void_p),
        ("logits", c.c_void_p),
        ("logits_stride", c.c_int64),
        ("bell", c.c_int32),
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fs_failure": (c.c_char_p, ()),
    "fs_model_new": (c.c_void_p, (c.POINTER(Shape),)),
    "fs_model_free": (None, (c.c_void_p,)),
    "fs_model_matrix": (
        c.c_int,
        (c.c_void_p, c.c_int, c.c_int, c.c_int, c.c_int, c.c_void_p, c.c_void_p),
    ),
    "fs_model_vector": (c.c_int, (c.c_void_p, c.c_int, c.c_int, c.c_int, c.c_void_p)),
    "fs_model_embedding": (None, (c.c_void_p, c.c_int, c.c_void_p)),
    "fs_model_rope": (None, (c.c_void_p, c.c_void_p, c.c_void_p)),
    "fs_model_forward": (c.c_int, (c.c_void_p, c.POINTER(NativeBatch))),
    "fs_ranks_sum": (
        None,
        (
            *(c.c_void_p, c.c_int, c.c_int, c.c_int),
            *(c.POINTER(c.c_uint32), c.c_void_p, c.c_int64),
        ),
    ),
    "fs_ranks_send": (None, (c.c_void_p, c.c_int, c.c_void_p, c.c_int64)),
    "fs_ranks_receive": (None, (c.c_void_p, c.c_int, c.c_void_p, c.c_int64)),
    "fs_copy": (None, (c.c_void_p, c.c_void_p, c.c_size_t)),
}


class Library:
    """A loaded library. Calls release the interpreter lock while they run."""

    def __init__(self, level: str) -> None:
        """Raises `NativeError` if this process cannot run it, or it is neither found nor built."""
        if level not in levels():
            raise NativeError(f"this machine does not run {level}")
        self.level = level
        path = library(level)
        try:
            # Local symbols: several levels may be loaded, and each has the same names.
            self._loaded = c.CDLL(str(path), mode=c.RTLD_LOCAL)
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self._loaded, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise NativeError(f"{path} cannot be loaded: {error}") from error

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function; raises RuntimeError with the reason if it reports a failure."""
        result = getattr(self._loaded, name)(*arguments)
        if _SIGNATURES[name][0] is not None and (result is None or result == -1):
            raise RuntimeError(f"{name}: {self._loaded.fs_failure().decode()}")
        return result


@cache
def best_library() -> Library:
    """The library for the best instruction set of this CPU. Raises `NativeError`."""
    return Library(levels()[0])
