"""Groups of ranks in threads of one process: the logits of the whole model, in every shape."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastserve.common.errors import StartupError
from fastserve.worker.model.batch import Batch
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.kv_cache import KvCache
from fastserve.worker.model.loader import load_model
from fastserve.worker.model.memory import weight_bytes
from fastserve.worker.native.library import best_library
from fastserve.worker.parallel.comm import SharedMemory
from fastserve.worker.parallel.groups import Group
from fastserve.worker.parallel.model import (
    GroupModel,
    Stage,
    follow,
    micro_batches,
    pack,
    unpack,
)
from fastserve.worker.parallel.shards import shard_of, split, split_heads, split_layers
from support.tiny_models import tiny_model

CPU = torch.device("cpu")
NINE_HEADS = {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "mlp_only_layers": [1],
}
# Two prefills, one of them not to its end; then decodes of both with another prefill between.
PREFILL = Batch([5, 6, 7, 8, 9, 250, 319], [4, 3], [4, 3], [[1], [2]], [0], [0])
MIXED = Batch([11, 40, 41, 42, 12], [1, 3, 1], [5, 3, 4], [[1], [3], [2]], [0, 1, 2], [0, 1, 7])


def _kv(config: ModelConfig) -> KvCache:
    return KvCache(config, 4, 8, torch.float32, CPU)


@pytest.mark.parametrize("tied", [False, True])
def test_what_weights_need_is_known_beforehand(tmp_path: Path, tied: bool) -> None:
    whole = tiny_model(tmp_path, tie_word_embeddings=tied)
    config = ModelConfig.from_folder(tmp_path)
    expected = sum(weight.nbytes for weight in whole.parameters() if weight.dim() == 2)
    assert weight_bytes(config, torch.float32) == expected
    assert weight_bytes(config, torch.bfloat16) == expected // 2
    stages = [Group(rank, 2, 2, rank, True, "", 0) for rank in range(4)]
    shards = [shard_of(config, group) for group in stages]
    both_ends = config.vocab_size * config.hidden_size * 4 if tied else 0
    total = sum(weight_bytes(config, torch.float32, shard=shard) for shard in shards)
    assert total == expected + both_ends


@pytest.mark.parametrize(
    ("tp", "pp", "architecture", "changes"),
    [
        (3, 1, "Llama", NINE_HEADS),
        (2, 1, "Llama", NINE_HEADS),  # 6 and 3 heads
        (4, 1, "Llama", {}),  # 2 KV heads: replicated
        (1, 2, "Llama", {"tie_word_embeddings": True}),
        (1, 3, "Llama", {}),
        (2, 2, "Llama", {"attention_bias": True}),
        (2, 1, "Mixtral", {"intermediate_size": 37}),  # 19 and 18 features of each expert
        (2, 2, "Qwen3Moe", EXPERTS),
        (2, 2, "Gemma", {"tie_word_embeddings": True}),
    ],
)
def test_a_group_has_the_logits_of_the_whole_model(
    tmp_path: Path, tp: int, pp: int, architecture: str, changes: dict[str, Any]
) -> None:
    tiny_model(tmp_path, architecture, **changes)
    whole = load_model(tmp_path, torch.float32, CPU)
    store = dist.HashStore()  # type: ignore[attr-defined]
    threads, leader = [], []

    def rank(number: int) -> None:
        group = Group(number, tp, pp, number, True, "", 0)
        shard = shard_of(whole.config, group)
        model = load_model(tmp_path, torch.float32, CPU, shard=shard)
        comm = SharedMemory(group, store, best_library(), 1 << 16)
        stage, kv = Stage(group, shard, model, comm), _kv(model.config)
        if number:
            follow(stage, kv)
        else:
            leader.append((GroupModel(stage, whole.config, split(whole.config.vocab_size, tp)), kv))

    for number in range(1, tp * pp):
        threads.append(threading.Thread(target=rank, args=(number,), daemon=True))
        threads[-1].start()
    rank(0)
    ((model, kv),) = leader
    reference = _kv(whole.config)
    seen = []
    model.observe = lambda seconds: seen.append(dict(seconds))
    for batch in (PREFILL, MIXED):
        expected, found = whole.forward(batch, reference), model.forward(batch, kv)
        assert found.shape == expected.shape
        for top, ours, theirs in zip(batch.tops, found, expected, strict=True):
            assert ours.argmax() == theirs.argmax()
            known = ours.isfinite()
            assert bool(known.all()) == (not top)
            assert int(known.sum()) >= max(top, 1)
            torch.testing.assert_close(ours[known], theirs[known], rtol=1e-4, atol=1e-4)
            if top:
                assert set(theirs.topk(top).indices.tolist()) <= set(known.nonzero()[:, 0].tolist())
    assert all(times["plan"] > 0 for times in seen) and len(seen) == 2
    model.stop()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_plan_survives_its_message_and_rows_stay_whole() -> None:
    assert unpack(pack(MIXED)) == MIXED
    parts = micro_batches(MIXED, 2)
    assert [part.query_lens for part in parts] == [[1, 3], [1]]
    assert [part.logit_rows for part in parts] == [[0, 1], [0]]
    assert [part.tops for part in parts] == [[0, 1], [7]]
    assert [token for part in parts for token in part.token_ids] == MIXED.token_ids


def test_heads_go_with_their_keys_and_the_head_of_the_model_counts() -> None:
    assert split_heads(9, 3, 2) == [(range(6), range(2)), (range(6, 9), range(2, 3))]
    assert split_heads(4, 2, 4)[2] == (range(2, 3), range(1, 2))
    with pytest.raises(StartupError, match="cannot share"):
        split_heads(6, 4, 6)


def test_the_stage_with_the_head_has_fewer_layers(tmp_path: Path) -> None:
    tiny_model(tmp_path, num_hidden_layers=12, vocab_size=1600)
    stages = split_layers(ModelConfig.from_folder(tmp_path), 3)
    assert [number for stage in stages for number in stage] == list(range(12))
    assert len(stages[2]) < len(stages[0])
