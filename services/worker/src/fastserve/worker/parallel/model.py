"""One iteration on all ranks of a group.

An iteration is one message of rank 0 (`pack`), which every rank runs on its own shard. The rows are
dealt to as many micro-batches as there are stages, so that all stages work at once; an iteration
ends when all of them have come out of the last stage, so no row is ever left half way.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from fastserve.worker.model.attention import PagedAttention
from fastserve.worker.model.batch import Batch
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.kv_cache import KvCache
from fastserve.worker.model.llama import Model
from fastserve.worker.parallel.comm import Comm, Message
from fastserve.worker.parallel.groups import Group, GroupLost
from fastserve.worker.parallel.shards import Shard

_STOP, _BATCH = 0, 1


def pack(batch: Batch) -> Message:
    """A batch as int32."""
    tables = batch.block_tables
    return np.array(
        [
            *(_BATCH, len(batch.token_ids), len(tables), len(batch.logit_rows)),
            *batch.token_ids,
            *batch.query_lens,
            *batch.context_lens,
            *map(len, tables),
            *batch.logit_rows,
            *(batch.tops or [0] * len(batch.logit_rows)),
            *(block for table in tables for block in table),
        ],
        np.int32,
    )


def unpack(message: Message) -> Batch | None:
    """The batch; None: the group ends."""
    values = iter(message.tolist())

    def take(count: int) -> list[int]:
        return [next(values) for _ in range(count)]

    if next(values) == _STOP:
        return None
    tokens, rows, wanted = take(3)
    token_ids, query_lens, context_lens, lengths = (take(n) for n in (tokens, rows, rows, rows))
    logit_rows, tops = take(wanted), take(wanted)
    tables = [take(length) for length in lengths]
    return Batch(token_ids, query_lens, context_lens, tables, logit_rows, tops)


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """At most `count` batches with about as many tokens each; a row stays whole."""
    parts: list[list[int]] = []
    total, part, seen = len(batch.token_ids), [0], batch.query_lens[0]
    for row in range(1, len(batch.query_lens)):
        if seen * count >= total * (len(parts) + 1):
            parts.append(part)
            part = []
        part.append(row)
        seen += batch.query_lens[row]
    return [_rows(batch, rows) for rows in [*parts, part]]


def _rows(batch: Batch, rows: list[int]) -> Batch:
    first, end = rows[0], rows[-1] + 1
    start = sum(batch.query_lens[:first])
    places = [i for i, row in enumerate(batch.logit_rows) if first <= row < end]
    return Batch(
        token_ids=batch.token_ids[start : start + sum(batch.query_lens[first:end])],
        query_lens=batch.query_lens[first:end],
        context_lens=batch.context_lens[first:end],
        block_tables=batch.block_tables[first:end],
        logit_rows=[batch.logit_rows[i] - first for i in places],
        tops=[batch.tops[i] for i in places],
    )


class Stage:
    """What one rank does in an iteration."""

    def __init__(self, group: Group, shard: Shard, model: Model, comm: Comm) -> None:
        self.group, self.shard, self.model, self.comm = group, shard, model, comm
        self.seconds: defaultdict[str, float] = defaultdict(float)  # of communication, by kind

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - begun

    def run(self, batch: Batch, kv: KvCache) -> torch.Tensor | None:
        """This rank's part of a micro-batch: its candidates, packed (`_candidates`), if it is of
        the last stage."""
        group, model = self.group, self.model
        attention = PagedAttention(batch, kv, model.config)
        if self.shard.first:
            x = self._reduce(self._embed(batch))
        else:
            shape = (len(batch.token_ids), model.config.hidden_size)
            x = torch.empty(shape, dtype=model.dtype, device=model.device)
            with self.timed("receive"):
                self.comm.receive(x, group.rank - group.tp)
        x = model.layers(x, attention, self._reduce)
        if not self.shard.last:
            with self.timed("send"):
                self.comm.send(x, group.rank + group.tp)
            return None
        if not batch.logit_rows:
            return torch.zeros(1)
        return _candidates(model.logits(x, attention), batch.tops, self.shard.vocab)

    def _reduce(self, x: torch.Tensor) -> torch.Tensor:
        with self.timed("reduce"):
            return self.comm.reduce(x)

    def _embed(self, batch: Batch) -> torch.Tensor:
        """Zeros for the tokens of other ranks."""
        vocab = self.shard.vocab
        ids = torch.tensor(batch.token_ids, device=self.model.device) - vocab.start
        mine = (ids >= 0) & (ids < len(vocab))
        x = self.model.rows(ids.clamp(0, len(vocab) - 1))
        return x.masked_fill(~mine[:, None], 0.0)


def _width(tops: list[int], vocab: range) -> int:
    return min(max(tops), len(vocab))


def _candidates(logits: torch.Tensor, tops: list[int], vocab: range) -> torch.Tensor:
    """float32 on the CPU: the likeliest of each row and their ids, then the rows with top 0 whole,
    then a zero, since every micro-batch has an answer."""
    width = _width(tops, vocab)
    if width == 1:
        values, ids = logits.max(dim=-1)  # the first of equals, as sampling does
    else:
        values, ids = logits.topk(width, dim=-1)
    whole = logits[[i for i, top in enumerate(tops) if not top]]
    numbers = (ids + vocab.start).int().cpu().flatten().view(torch.float32)
    return torch.cat((values.cpu().flatten(), numbers, whole.cpu().flatten(), torch.zeros(1)))


def _answer_size(tops: list[int], vocab: range) -> int:
    if not tops:
        return 1
    return len(tops) * 2 * _width(tops, vocab) + tops.count(0) * len(vocab) + 1


def _scatter(logits: torch.Tensor, answer: torch.Tensor, tops: list[int], vocab: range) -> None:
    """Put a rank's candidates into logits [rows, whole vocabulary]."""
    if not tops:
        return
    rows, width = len(tops), _width(tops, vocab)
    count = rows * width
    values = answer[:count].view(rows, width)
    ids = answer[count : 2 * count].view(torch.int32).long().view(rows, width)
    logits.scatter_(1, ids, values)
    whole = [i for i, top in enumerate(tops) if not top]
    logits[whole, vocab.start : vocab.stop] = answer[2 * count : -1].view(len(whole), len(vocab))


class GroupModel:
    """The whole group as one model, for the engine of rank 0."""

    def __init__(self, stage: Stage, whole: ModelConfig, vocabs: list[range]) -> None:
        """vocabs: of each tensor parallel rank."""
        self._stage, self._vocabs = stage, vocabs
        self._vocab_size = whole.vocab_size
        self.observe: Callable[[Mapping[str, float]], None] = lambda _: None
        # called after each iteration with its seconds of communication by kind

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KvCache) -> torch.Tensor:
        """As `Model.forward`, but -inf stands for logits that `batch.tops` does not ask for.

        Raises `GroupLost` for whatever goes wrong: the other ranks are in the middle of it too.
        """
        try:
            return self._forward(batch, kv)
        except Exception as error:
            raise GroupLost(f"an iteration failed: {error}") from error

    def _forward(self, batch: Batch, kv: KvCache) -> torch.Tensor:
        stage, group = self._stage, self._stage.group
        stage.seconds.clear()
        if not batch.tops:
            batch = replace(batch, tops=[0] * len(batch.logit_rows))
        with stage.timed("plan"):
            stage.comm.broadcast(pack(batch))
        parts = micro_batches(batch, group.pp)
        own = [stage.run(part, kv) for part in parts]
        logits = torch.full((len(batch.logit_rows), self._vocab_size), float("-inf"))
        row = 0
        for part, mine in zip(parts, own, strict=True):
            into = logits[row : row + len(part.tops)]
            row += len(part.tops)
            for rank, vocab in zip(group.ends, self._vocabs, strict=True):
                answer = mine if rank == group.rank else None
                if answer is None:
                    answer = torch.empty(_answer_size(part.tops, vocab))
                    with stage.timed("results"):
                        stage.comm.receive(answer, rank)
                _scatter(into, answer, part.tops, vocab)
        stage.comm.finish()
        self.observe(stage.seconds)
        return logits

    def stop(self) -> None:
        """The other ranks end."""
        self._stage.comm.broadcast(np.array([_STOP], np.int32))


@torch.inference_mode()
def follow(stage: Stage, kv: KvCache) -> None:
    """Run what rank 0 says until it says stop."""
    while True:
        with stage.timed("plan"):
            message = stage.comm.broadcast(None)
        if (batch := unpack(message)) is None:
            return
        for part in micro_batches(batch, stage.group.pp):
            answer = stage.run(part, kv)
            if answer is not None:
                stage.comm.send(answer, 0)
        stage.comm.finish()
