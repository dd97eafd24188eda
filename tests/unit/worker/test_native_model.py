"""The CPU kernels against PyTorch, and against themselves: same bits in any company."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve.worker.model.batch import Batch
from fastserve.worker.model.kv_cache import KvCache
from fastserve.worker.model.llama import Model
from fastserve.worker.model.loader import load_model, load_native
from fastserve.worker.model.native import NativeModel, why_not_native
from fastserve.worker.native.build import NativeError, all_levels, levels
from fastserve.worker.native.library import Library
from support.tiny_models import VOCAB, tiny_model

CPU = torch.device("cpu")
BLOCKS = 64
LEVELS = levels()

# Odd sizes, so that panels, groups and strips have remainders; every shape of grouped heads.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "odd sizes": ("Llama", {"hidden_size": 72, "intermediate_size": 101, "vocab_size": 331}),
    "wide": ("Llama", {"hidden_size": 160, "intermediate_size": 800, "num_hidden_layers": 1}),
    "biases": ("Llama", {"attention_bias": True, "intermediate_size": 48}),
    "no groups": ("Llama", {"num_key_value_heads": 4}),
    "three to one": (
        "Llama",
        {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "eight to one": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "head dimension 64": ("Llama", {"head_dim": 64}),
    "head dimension 80": ("Llama", {"head_dim": 80, "num_hidden_layers": 1}),
    "head dimension 96": ("Llama", {"head_dim": 96, "num_hidden_layers": 1}),
    "head dimension 128": ("Llama", {"head_dim": 128, "num_hidden_layers": 1}),
    "window": ("Mistral", {"sliding_window": 20}),
    # Heads as wide as a tile of AMX, whose attention is another.
    "wide heads, three to one": (
        "Llama",
        {
            "hidden_size": 144,
            "head_dim": 64,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
    ),
    "wide heads, window": ("Mistral", {"head_dim": 32, "sliding_window": 20}),
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "norms of queries and keys": ("Qwen3", {"head_dim": 32}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp("model") for name in VARIANTS}


def folder_of(folders: dict[str, Path], variant: str) -> Path:
    folder = folders[variant]
    if not (folder / "config.json").exists():
        architecture, changes = VARIANTS[variant]
        tiny_model(folder, architecture, **changes)
    return folder


def native(
    folder: Path,
    dtype: torch.dtype,
    *,
    int8: bool = False,
    level: str = LEVELS[0],
    threads: int = 2,
    block_size: int = 16,
) -> NativeModel:
    library = Library(level)
    return load_native(folder, dtype, library, block_size=block_size, threads=threads, int8=int8)


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (length,), generator=generator).tolist()


class Jobs:
    """Runs jobs on a cache of their own and keeps the logits of the token at each position."""

    def __init__(
        self, model: Model | NativeModel, prompts: Sequence[list[int]], block_size: int = 16
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.kv = KvCache(model.config, BLOCKS, block_size, model.dtype, CPU)
        # Whatever stood in a block before must not matter.
        self.kv.data.normal_(generator=torch.Generator().manual_seed(9))
        free = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(3)).tolist()
        self.tables = [
            [free.pop() for _ in range(-(-len(tokens) // block_size))] for tokens in prompts
        ]
        self.done = [0] * len(prompts)
        self.logits: list[dict[int, torch.Tensor]] = [{} for _ in prompts]

    def step(self, counts: dict[int, int]) -> None:
        """One iteration: job -> new tokens."""
        jobs = list(counts)
        for job, count in counts.items():
            self.done[job] += count
        batch = Batch(
            token_ids=[
                token
                for job, count in counts.items()
                for token in self.prompts[job][self.done[job] - count : self.done[job]]
            ],
            query_lens=list(counts.values()),
            context_lens=[self.done[job] for job in jobs],
            block_tables=[self.tables[job] for job in jobs],
            logit_rows=list(range(len(jobs))),
        )
        for job, logits in zip(jobs, self.model.forward(batch, self.kv), strict=True):
            self.logits[job][self.done[job] - 1] = logits.clone()


def alone(
    model: Model | NativeModel, tokens: list[int], cuts: Sequence[int], block_size: int = 16
) -> dict[int, torch.Tensor]:
    """Logits by position of a job that runs by itself, in chunks that end at `cuts`."""
    jobs = Jobs(model, [tokens], block_size)
    for cut in cuts:
        jobs.step({0: cut - jobs.done[0]})
    return jobs.logits[0]


CUTS = (1, 2, 19, 32, 33, 80, 81, 82)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_agrees_with_torch(variant: str, folders: dict[str, Path]) -> None:
    folder = folder_of(folders, variant)
    theirs = alone(load_model(folder, torch.float32, CPU), prompt(82), CUTS)
    ours = alone(native(folder, torch.float32), prompt(82), CUTS)
    for position, logits in theirs.items():
        assert logits.std() > 0.3
        torch.testing.assert_close(ours[position], logits, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["llama", "odd sizes", "wide", "biases", "window"])
def test_int8_agrees_with_torch(variant: str, folders: dict[str, Path]) -> None:
    """Apart from inputs that fall between two integers and are rounded either way."""
    folder = folder_of(folders, variant)
    theirs = alone(load_model(folder, torch.float32, CPU, int8=True), prompt(82), CUTS)
    ours = alone(native(folder, torch.float32, int8=True), prompt(82), CUTS)
    exact = alone(load_model(folder, torch.float32, CPU), prompt(82), CUTS)
    for position, logits in theirs.items():
        quantised = float((logits - exact[position]).abs().mean())
        assert quantised > 1e-3
        difference = float((ours[position] - logits).abs().mean())
        assert difference < 0.25 * quantised


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_near_float32(variant: str, folders: dict[str, Path]) -> None:
    folder = folder_of(folders, variant)
    exact = alone(load_model(folder, torch.float32, CPU), prompt(82), CUTS)
    ours = alone(native(folder, torch.bfloat16), prompt(82), CUTS)
    theirs = alone(load_model(folder, torch.bfloat16, CPU), prompt(82), CUTS)
    ours_off = [float((ours[p] - exact[p]).abs().mean()) for p in exact]
    theirs_off = [float((theirs[p] - exact[p]).abs().mean()) for p in exact]
    # The residual stream stays in float32 here, so we are nearer than PyTorch in bfloat16.
    assert sum(ours_off) < sum(theirs_off)


@pytest.mark.slow  # compiles for each of them
@pytest.mark.timeout(600)
@pytest.mark.parametrize("level", all_levels())
@pytest.mark.parametrize(
    ("dtype", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_every_instruction_set_computes_the_same(
    level: str, dtype: torch.dtype, int8: bool, folders: dict[str, Path]
) -> None:
    if level not in LEVELS:
        pytest.skip(f"this CPU or its operating system does not offer {level}")
    folder = folder_of(folders, "odd sizes")
    best = alone(native(folder, dtype, int8=int8), prompt(60), (41, 60))
    other = alone(native(folder, dtype, int8=int8, level=level), prompt(60), (41, 60))
    for position, logits in best.items():
        off = float((other[position] - logits).abs().mean() / logits.std())
        assert off < (1e-5 if dtype is torch.float32 else 0.02)
    tokens = alone(native(folder, dtype, int8=int8, level=level), prompt(60), range(1, 61))
    for position, logits in other.items():
        assert torch.equal(logits, tokens[position])


# --- the same bits -------------------------------------------------------------------------------

WAYS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]


@pytest.mark.parametrize(("dtype", "int8"), WAYS)
@pytest.mark.parametrize(
    "variant",
    ["odd sizes", "three to one", "window", "wide heads, three to one", "wide heads, window"],
)
def test_logits_do_not_depend_on_company_or_chunks(
    variant: str, dtype: torch.dtype, int8: bool, folders: dict[str, Path]
) -> None:
    """One job: alone, cut in other places, on other threads, and among 1 to 32 others."""
    model = native(folder_of(folders, variant), dtype, int8=int8)
    tokens = prompt(70)
    expected = alone(model, tokens, range(1, 71))  # token by token
    one_thread = native(folder_of(folders, variant), dtype, int8=int8, threads=1)
    for found in (
        alone(model, tokens, (70,)),
        alone(model, tokens, (1, 3, 20, 64, 65, 70)),
        alone(one_thread, tokens, (17, 34, 51, 69, 70)),
    ):
        for position, logits in found.items():
            assert torch.equal(logits, expected[position]), position
    others = [prompt(3 + seed % 29, seed) for seed in range(1, 33)]
    for count in (1, 2, 3, 6, 7, 15, 32):
        jobs = Jobs(model, [*others[:count], tokens])
        last = count  # our job stands last, so behind a changing number of tokens
        for part in (5, 1, 30, 1, 1, 31, 1):
            mates = {
                job: min(1 + job % 3, len(others[job]) - jobs.done[job])
                for job in range(count)
                if jobs.done[job] < len(others[job])
            }
            jobs.step({**mates, last: part})
        for position, logits in jobs.logits[last].items():
            assert torch.equal(logits, expected[position]), (count, position)


@pytest.mark.parametrize(("dtype", "int8"), WAYS)
@pytest.mark.parametrize("length", [193, 199, 200])  # 192 rows at a time; then 1, 7, 8 are left
def test_rows_that_are_left_over_get_the_same_bits(
    length: int, dtype: torch.dtype, int8: bool, folders: dict[str, Path]
) -> None:
    model = native(folder_of(folders, "odd sizes"), dtype, int8=int8)
    tokens = prompt(length)
    whole = alone(model, tokens, (length,))
    parts = alone(model, tokens, (7, 15, 32, 49, length))
    assert torch.equal(whole[length - 1], parts[length - 1])


def test_each_iteration_rings_once(folders: dict[str, Path]) -> None:
    model = native(folder_of(folders, "llama"), torch.float32)
    model.bell = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        alone(model, prompt(20), (7, 19, 20))
        assert os.eventfd_read(model.bell) == 3
        os.eventfd_write(model.bell, 2**64 - 2)  # as far as it counts: one that rings is enough
        alone(model, prompt(20), (20,))
    finally:
        os.close(model.bell)


@pytest.mark.parametrize(("dtype", "int8"), WAYS)
def test_larger_blocks_hold_the_same(
    dtype: torch.dtype, int8: bool, folders: dict[str, Path]
) -> None:
    folder = folder_of(folders, "llama")
    small = alone(native(folder, dtype, int8=int8), prompt(75), (50, 75))
    model = native(folder, dtype, int8=int8, block_size=48)
    for position, logits in alone(model, prompt(75), (50, 75), block_size=48).items():
        assert torch.equal(logits, small[position])


@pytest.mark.parametrize("variant", ["llama", "head dimension 64"])
@pytest.mark.parametrize("int8", [False, True])
def test_a_broken_job_does_not_break_the_next_in_its_blocks(
    variant: str, int8: bool, folders: dict[str, Path]
) -> None:
    model = native(folder_of(folders, variant), torch.bfloat16, int8=int8)
    tokens = prompt(37)
    expected = alone(model, tokens, (20, 37))
    jobs = Jobs(model, [tokens])
    jobs.kv.data.fill_(float("nan"))
    jobs.step({0: 20})
    jobs.step({0: 17})
    for position, logits in jobs.logits[0].items():
        assert torch.equal(logits, expected[position])


@pytest.mark.parametrize(("dtype", "int8"), WAYS)
@pytest.mark.parametrize("variant", ["llama", "head dimension 64"])
def test_what_is_not_finite_stays_so(
    variant: str, dtype: torch.dtype, int8: bool, folders: dict[str, Path]
) -> None:
    model = native(folder_of(folders, variant), dtype, int8=int8)
    model._embedding[7, 5] = float("nan")
    jobs = Jobs(model, [[7, 8, 9], [10, 11, 12]])
    jobs.step({0: 3, 1: 3})
    assert not jobs.logits[0][2].isfinite().any()
    assert jobs.logits[1][2].isfinite().all()


def test_a_level_that_does_not_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastserve.worker.native.library.levels", lambda: ["portable"])
    with pytest.raises(NativeError, match="does not run amx"):
        Library("amx")


@pytest.mark.skipif("amx" not in LEVELS, reason="this CPU or its operating system has no AMX")
def test_without_leave_to_use_tiles_the_next_level_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastserve.worker.native.build._may_use_tiles", lambda: False)
    assert levels.__wrapped__() == LEVELS[1:]


def test_what_the_kernels_cannot_run(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(folder_of(folders, "llama"), torch.float32, CPU)
    assert why_not_native(model.config, 16) == ""
    assert "block size of 8" in why_not_native(model.config, 8)
    tiny_model(tmp_path, head_dim=24)
    odd = load_model(tmp_path, torch.float32, CPU)
    assert "head dimension of 24" in why_not_native(odd.config, 16)
