"""The device: which one, which dtype, and the linear layer that is fastest on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastserve.common.errors import StartupError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda".

    Raises `StartupError` for another name, or for cuda where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise StartupError(f"device {name!r} is not one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError("device cuda was asked for, but PyTorch sees no CUDA device")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype for "auto", "float32", "bfloat16" or "float16" on `device`.

    auto is bfloat16 on CUDA and float32 on a CPU, where PyTorch emulates bf16 unless the CPU is
    recent; the kernels of our own take bfloat16 (choose.py). Raises `StartupError` for
    other names, and for float16 on a CPU, which emulates it too.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise StartupError(f"dtype {name!r} is not one of auto, {', '.join(_DTYPES)}")
    if name == "float16" and device.type == "cpu":
        raise StartupError("float16 is emulated on CPUs and unusably slow: use float32 or bfloat16")
    return _DTYPES[name]


class Linear:
    """y = x W^T + b for x [T, in] -> [T, out].

    On a CPU a reduced-precision weight is packed once into oneDNN's blocked layout. In float32 the
    plain layout stays: oneDNN's own kernels sum in another order, and over all layers of a model
    the logits come out up to 1.6e-4 away from those of transformers, against 0.9e-4.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """weight [out, in], bias [out]."""
        self._bias = bias
        on_cpu = weight.device.type == "cpu" and torch._C._has_mkldnn
        self._packed = on_cpu and weight.dtype is not torch.float32
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packed else weight
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._packed:
            return F.linear(x, self._weight, self._bias)
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return y


class Int8Linear:
    """y = x W^T + b with weights and inputs in int8, computed in float32: what the CPU kernels do,
    in plain PyTorch and slowly.

    Weights [out, in] have a scale, in bf16, for each output and group of 32 inputs; inputs have one
    for each token and group. A group's sum is an integer that float32 holds exactly.
    """

    _GROUP = 32

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """weight [out, in], bias [out]."""
        self._bias = bias
        self._inputs = weight.shape[1]
        groups = self._grouped(weight)
        self._scale = (groups.abs().amax(dim=-1) / 127).bfloat16().to(weight.dtype)  # [out, groups]
        inverse = torch.where(self._scale > 0, 1 / self._scale, 0.0)
        numbers = (groups * inverse[..., None]).round().clamp(-127, 127)
        self._weight = numbers.to(torch.int8)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        groups = self._grouped(x)
        most = groups.abs().amax(dim=-1)
        inverse = torch.where(most > 0, 127 / most, 0.0)
        numbers = (groups * inverse[..., None]).round()
        scale = most / 127
        total = x.new_zeros(x.shape[0], self._weight.shape[0])
        for group in range(numbers.shape[1]):
            products = F.linear(numbers[:, group], self._weight[:, group].to(x.dtype))
            total += products * self._scale[:, group] * scale[:, group, None]
        return total if self._bias is None else total + self._bias

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, groups, 32], zeros at the end."""
        padded = F.pad(x, (0, -self._inputs % self._GROUP))
        return padded.view(x.shape[0], -1, self._GROUP)
