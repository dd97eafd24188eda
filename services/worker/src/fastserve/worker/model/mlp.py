"""The feed-forward half of a layer: one gated MLP, or a mixture of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F

from fastserve.worker.model.backend import Int8Linear, Linear

Activation: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP; gate and up are fused into one product."""

    gate_up: Linear | Int8Linear  # [hidden -> 2 * intermediate]
    down: Linear | Int8Linear
    activation: Activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]"""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Gated MLPs of which a router chooses some for every token."""

    router: torch.Tensor  # [experts, hidden]
    gate_up: torch.Tensor  # [experts, 2 * intermediate, hidden]
    down: torch.Tensor  # [experts, hidden, intermediate]
    per_token: int
    normalised: bool  # the weights of the chosen ones are made to add up to 1
    activation: Activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]

        A token's experts are added up in the order of their weights, in float32, whatever other
        tokens have chosen. The sizes of the groups stay on the device.
        """
        scores = F.softmax(F.linear(x, self.router), dim=-1, dtype=torch.float32)
        weights, chosen = scores.topk(self.per_token, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        experts, order = chosen.flatten().sort(stable=True)  # of pairs of a token and a choice
        numbers = torch.arange(len(self.router), device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        gate_up = F.grouped_mm(x[order // self.per_token], self.gate_up.mT, offs=ends)
        gate, up = gate_up.chunk(2, dim=-1)
        sorted_outputs = F.grouped_mm(self.activation(gate) * up, self.down.mT, offs=ends)
        outputs = torch.empty_like(sorted_outputs)
        outputs[order] = sorted_outputs
        by_token = outputs.view(*weights.shape, -1)
        return (by_token * weights[..., None]).sum(dim=1).to(x.dtype)
