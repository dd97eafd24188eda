"""Which part of a model a rank owns: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from fastserve.common.errors import StartupError
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.parallel.groups import Group


@dataclass(frozen=True, slots=True)
class Shard:
    """Half-open ranges of the whole model.

    Key-value heads go with the query heads that use them. With fewer of them than shards they are
    replicated and their query heads are split.
    """

    layers: range
    heads: range
    kv_heads: range
    middle: range  # of the MLP's intermediate features
    expert_middle: range  # of those of each expert
    vocab: range
    first: bool  # this stage embeds
    last: bool  # this stage has the head
    bias: bool  # this shard adds the bias of row-parallel products

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The sizes of the shard; the vocabulary and hidden size stay whole."""
        experts = whole.experts
        if experts is not None:
            first = self.layers.start
            experts = replace(
                experts,
                intermediate_size=len(self.expert_middle),
                dense_layers=tuple(i - first for i in experts.dense_layers if i in self.layers),
            )
        return replace(
            whole,
            num_layers=len(self.layers),
            num_heads=len(self.heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.middle),
            experts=experts,
        )


def shard_of(config: ModelConfig, group: Group) -> Shard:
    """Raises `StartupError` if the model cannot be cut into that many parts."""
    if group.pp > config.num_layers:
        raise StartupError(f"{group.pp} stages are more than the {config.num_layers} layers")
    heads, kv_heads = split_heads(config.num_heads, config.num_kv_heads, group.tp)[group.index]
    experts = config.experts
    return Shard(
        layers=split_layers(config, group.pp)[group.stage],
        heads=heads,
        kv_heads=kv_heads,
        middle=split(config.intermediate_size, group.tp)[group.index],
        expert_middle=split(experts.intermediate_size if experts else 0, group.tp)[group.index],
        vocab=split(config.vocab_size, group.tp)[group.index],
        first=group.stage == 0,
        last=group.last,
        bias=group.index == 0,
    )


def split(count: int, parts: int) -> list[range]:
    """Contiguous ranges whose lengths differ by one at the most, the longer ones first."""
    size, longer = divmod(count, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def split_heads(heads: int, kv_heads: int, parts: int) -> list[tuple[range, range]]:
    """(query heads, key-value heads) of each part. Raises `StartupError` for too many parts."""
    if parts > heads:
        raise StartupError(f"{parts} tensor parallel ranks are more than the {heads} heads")
    group = heads // kv_heads
    if parts <= kv_heads:
        return [(range(kv.start * group, kv.stop * group), kv) for kv in split(kv_heads, parts)]
    found = []
    for kv, ranks in enumerate(split(parts, kv_heads)):
        if len(ranks) > group:
            raise StartupError(
                f"{parts} tensor parallel ranks cannot share {kv_heads} key-value heads "
                f"of {group} query heads each"
            )
        first = kv * group
        found += [
            (range(first + part.start, first + part.stop), range(kv, kv + 1))
            for part in split(group, len(ranks))
        ]
    return found


def split_layers(config: ModelConfig, stages: int) -> list[range]:
    """Layers by stage so that the slowest stage is as fast as can be; the head counts as much as
    the layers whose weights take as many bytes."""
    if stages == 1:
        return [range(config.num_layers)]
    layers = sum(config.layer_weights(layer) for layer in range(config.num_layers))
    head = config.vocab_size * config.hidden_size / (layers / config.num_layers)

    def slowest(last: int) -> float:
        return max(-(-(config.num_layers - last) // (stages - 1)), last + head)

    last = min(range(1, config.num_layers - stages + 2), key=slowest)
    before = split(config.num_layers - last, stages - 1)
    return [*before, range(config.num_layers - last, config.num_layers)]
