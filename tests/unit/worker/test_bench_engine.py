"""Limits and tables of `fastserve bench engine`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastserve.worker.bench.engine import limit_of, parameters, run, table
from fastserve.worker.bench.limits import Limits
from fastserve.worker.model.choose import choose, load
from fastserve.worker.model.config import ModelConfig
from support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(folder, num_hidden_layers=1, max_position_embeddings=256)
    return folder


def test_weights_are_counted_as_the_model_has_them(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    theirs = tiny_model(folder.parent / "same", num_hidden_layers=1, max_position_embeddings=256)
    matrices = [p for n, p in theirs.named_parameters() if p.dim() == 2 and "embed" not in n]
    assert sum(parameters(config)) == sum(matrix.numel() for matrix in matrices)


def test_of_experts_those_count_that_are_chosen(tmp_path: Path) -> None:
    theirs = tiny_model(tmp_path, "Mixtral", num_hidden_layers=1)
    config = ModelConfig.from_folder(tmp_path)
    matrices = [p for n, p in theirs.named_parameters() if p.dim() > 1 and "embed" not in n]
    assert sum(parameters(config)) == sum(matrix.numel() for matrix in matrices)
    expert = 3 * 64 * 112
    assert sum(parameters(config)) - sum(parameters(config, 2)) == 6 * expert
    way = choose(config, device="cpu", cpu_kernels="torch", threads=1)
    slow = Limits(read=4.0, operations=1e30, attention=1e30)  # a weight per second

    def seconds(rows: int) -> float:
        return limit_of(config, way, slow, rows=rows, tokens=1, context=1)[0]

    kv = 2 * 2 * 16
    assert seconds(1) == pytest.approx(sum(parameters(config, 2)) + kv)
    both = 2 + 2 * 6 / 8  # what the second token chooses is new six times of eight
    assert seconds(2) == pytest.approx(sum(parameters(config, both)) + 2 * kv)


def test_the_limit_is_memory_for_one_row_and_arithmetic_for_a_prefill(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    way = choose(config, device="cpu", cpu_kernels="torch", threads=1)
    limits = Limits(read=1e9, operations=2e10, attention=1e10)
    seconds, bound = limit_of(config, way, limits, rows=1, tokens=1, context=10)
    kv = 10 * 2 * 2 * 16  # tokens, K and V, heads, dimensions
    assert bound == "memory"
    assert seconds == pytest.approx(4 * (sum(parameters(config)) + kv) / 1e9)
    seconds, bound = limit_of(config, way, limits, rows=1, tokens=100, context=100)
    layers, head = parameters(config)
    pairs = 100 * 101 / 2
    assert bound == "arithmetic"
    products = 2 * (layers * 100 + head)
    assert seconds == pytest.approx(products / 2e10 + 4 * pairs * 4 * 16 / 1e10)


def test_a_table_of_every_step_that_fits(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    way = choose(config, device="cpu", dtype="float32", threads=1)
    before = torch.get_num_threads()
    found = run(load(folder, way), way, Limits(1e10, 1e11, 1e11), seconds=0)
    torch.set_num_threads(before)
    kinds = [(one.kind, one.rows, one.context) for one in found]
    assert kinds == [*(("decode", rows, 256) for rows in (1, 8, 32, 64)), ("prefill", 1, 128)]
    assert all(one.ratio > 0 and one.tokens_per_second > 0 for one in found)
    assert len(table(found).splitlines()) == 1 + len(found)
