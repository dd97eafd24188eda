"""A mixture of experts against its definition, token by token."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.worker.model.mlp import ACTIVATIONS, Mixture

EXPERTS, HIDDEN, MIDDLE = 5, 16, 24


def mixture(seed: int, per_token: int, *, normalised: bool) -> Mixture:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    return Mixture(
        router=noise(EXPERTS, HIDDEN),
        gate_up=noise(EXPERTS, 2 * MIDDLE, HIDDEN),
        down=noise(EXPERTS, HIDDEN, MIDDLE),
        per_token=per_token,
        normalised=normalised,
        activation=ACTIVATIONS["silu"],
    )


def defined(model: Mixture, token: torch.Tensor) -> torch.Tensor:
    """Of one token [hidden], with a loop over its experts."""
    scores = (model.router @ token).softmax(dim=0)
    chosen = scores.argsort(descending=True)[: model.per_token]
    total = float(scores[chosen].sum()) if model.normalised else 1.0
    result = torch.zeros(HIDDEN)
    for expert in chosen:
        gate, up = (model.gate_up[expert] @ token).chunk(2)
        result += scores[expert] / total * (model.down[expert] @ (F.silu(gate) * up))
    return result


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 40),
    per_token=st.integers(1, EXPERTS),
    normalised=st.booleans(),
)
def test_each_token_gets_its_own_experts_in_any_company(
    seed: int, tokens: int, per_token: int, normalised: bool
) -> None:
    model = mixture(seed, per_token, normalised=normalised)
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed + 1))
    together = model(x)
    expected = torch.stack([defined(model, token) for token in x])
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x[-1:])[0], together[-1], rtol=1e-5, atol=1e-6)


def test_all_tokens_to_one_expert_and_none_to_the_others() -> None:
    model = mixture(3, 1, normalised=True)
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(4)).repeat(7, 1)
    torch.testing.assert_close(model(x), defined(model, x[0]).repeat(7, 1))


def test_bfloat16_stays_bfloat16() -> None:
    exact = mixture(5, EXPERTS, normalised=True)  # all experts, so that no choice turns
    matrices = {name: getattr(exact, name).bfloat16() for name in ("router", "gate_up", "down")}
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(6))
    found = replace(exact, **matrices)(x.bfloat16())
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), exact(x), rtol=0.02, atol=0.01)
