"""An engine with a model that shows wrong KV at once, and copies that end when the test says so."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastserve.worker.block_pool import BlockPool
from fastserve.worker.engine import Engine, Iteration, NewJob, Plan
from fastserve.worker.job import Op, OpKind, OpResult, OpStatus
from fastserve.worker.kv_ops import CopyDone
from fastserve.worker.model.batch import Batch
from fastserve.worker.model.config import ModelConfig, Rope
from fastserve.worker.model.kv_cache import KvCache
from fastserve.worker.model.sampling import SampleRow, SamplingParams, sample
from fastserve.worker.staging import BlockRef, Copied, Place

VOCAB = 64
BLOCK = 4
POISON = 63  # a context with this token gives logits that are not finite
CRASH = 62  # a batch with this token makes the model raise

CONFIG = ModelConfig(
    architecture="fake",
    vocab_size=VOCAB,
    hidden_size=2,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    intermediate_size=1,
    rms_norm_eps=1e-6,
    rope=Rope(1.0),
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    qkv_bias=False,
    output_bias=False,
    qk_norm=False,
    sliding_window=None,
    eos_token_ids=(),
)


def logits_of(context: Sequence[int]) -> torch.Tensor:
    """Logits [vocab]: a hash of all tokens of the context. The last two tokens never come."""
    if POISON in context:
        return torch.full((VOCAB,), float("nan"))
    digest = hashlib.blake2b(bytes(context), digest_size=6).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    logits = torch.randn(VOCAB, generator=generator)
    logits[CRASH:] = -100.0
    return logits


def chained(before: int, token: int) -> int:
    """What KV of a token comes down to: a number that depends on all tokens before it, too."""
    return (before * 31 + token + 1) % 65521


def undisturbed(prompt: Sequence[int], params: SamplingParams, count: int) -> list[int]:
    """The first `count` output tokens, without an engine and without a cache."""
    output: list[int] = []
    for _ in range(count):
        row = SampleRow(params, prompt, output)
        (chosen,) = sample(logits_of([*prompt, *output])[None], [row], frozenset())
        assert chosen is not None
        output.append(chosen.token)
    return output


class FakeModel:
    """Keeps each token in the KV cache, with a number that stands for all before it, and reads them
    back."""

    def __init__(self, mover: FakeMover) -> None:
        self._mover = mover
        self.pool: BlockPool | None = None
        self.batches: list[Batch] = []
        self.beside: Callable[[], None] = lambda: None  # called before each row is computed

    def forward(self, batch: Batch, kv: KvCache) -> torch.Tensor:
        self.batches.append(batch)
        if CRASH in batch.token_ids:
            raise RuntimeError("device on fire")
        pages = kv.data[:, 0, 0, 0]  # [block, token in block, (token + 1, chained)]
        tokens = iter(batch.token_ids)
        logits = []
        for row, count in enumerate(batch.query_lens):
            self.beside()
            table, end = batch.block_tables[row], batch.context_lens[row]
            assert count > 0, "a row without tokens has no logits"
            used = table[: -(-end // BLOCK)]
            written = table[(end - count) // BLOCK : len(used)]
            assert not self._mover.loading & set(used), "a block is used while it is loaded"
            assert not self._mover.busy & set(written), "a block is written while it is copied"
            assert self.pool is not None
            assert not any(map(self.pool.shared, written)), "a block is written that others read"
            for position in range(end - count, end):
                before = position - 1
                state = int(pages[table[before // BLOCK], before % BLOCK][1]) if position else 0
                slot, token = pages[table[position // BLOCK], position % BLOCK], next(tokens)
                slot[0], slot[1] = token + 1, chained(state, token)
            if row in batch.logit_rows:
                found = pages[used].reshape(-1, 2)[:end]
                context = [int(token) - 1 for token in found[:, 0]]
                chain = list(itertools.accumulate(context, chained, initial=0))[1:]
                assert found[:, 1].tolist() == chain, "KV of another context"
                logits.append(logits_of(context))
        assert next(tokens, None) is None
        return torch.stack(logits) if logits else torch.empty(0, VOCAB)


@dataclass
class Copy:
    """A copy under way: which blocks it touches, and what happens when it ends."""

    kind: str
    job_id: str
    blocks: list[int]
    end: Callable[[], None]


class FakeMover:
    """Host memory of `capacity` blocks. Bytes move when a copy ends, not when it starts, so that a
    block that is used too early spoils what is copied or is spoilt itself.

    caches: room that jobs leave is for the prefix cache.
    """

    def __init__(self, capacity: int = 1000, *, caches: bool = False) -> None:
        self.generation = 1
        self.capacity, self.caches = capacity, caches
        self.cache: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self.cached_blocks = 0
        self.kv: KvCache | None = None
        self.host: dict[str, dict[int, tuple[torch.Tensor, int]]] = {}
        self.under_way: list[Copy] = []

    @property
    def busy(self) -> set[int]:
        return {block for copy in self.under_way if copy.kind != "save" for block in copy.blocks}

    @property
    def loading(self) -> set[int]:
        return {block for copy in self.under_way if copy.kind == "load" for block in copy.blocks}

    @property
    def inventory(self) -> dict[str, int]:
        return {job: sum(valid for _, valid in held.values()) for job, held in self.host.items()}

    def end(self, which: int = 0) -> None:
        """The copy ends, well or not."""
        self.under_way.pop(which).end()

    def end_all(self) -> None:
        while self.under_way:
            self.end()

    def die(self) -> None:
        """The sidecar starts anew with nothing in it."""
        self.generation += 1
        self.host.clear()
        self.cache.clear()

    def store(self, job_id: str, blocks: Sequence[BlockRef], done: CopyDone) -> None:
        life = self.generation
        assert blocks and not self.loading & {ref.block for ref in blocks}

        def end() -> None:
            held = self.host.get(job_id, {})
            more = len({ref.index for ref in blocks} - set(held))
            used = sum(len(blocks) for blocks in self.host.values())
            if life != self.generation or used + more > self.capacity:
                done(OpStatus.NO_HOST_SPACE, Copied(0, 0, 0.0))
                return
            for ref in blocks:
                content = self._kv.data[ref.block].clone()
                self.host.setdefault(job_id, {})[ref.index] = (content, ref.valid_tokens)
            self._make_room()
            assert sorted(self.host[job_id]) == list(range(len(self.host[job_id]))), "a gap"
            done(OpStatus.OK, self._copied([ref.valid_tokens for ref in blocks]))

        self.under_way.append(Copy("store", job_id, [ref.block for ref in blocks], end))

    def load(self, job_id: str, blocks: Sequence[int], done: CopyDone) -> None:
        assert blocks and not self.busy & set(blocks)

        def end() -> None:
            held = self.host.get(job_id, {})
            if not set(range(len(blocks))) <= set(held):
                done(OpStatus.LOST, Copied(0, 0, 0.0))
                return
            for index, block in enumerate(blocks):
                self._kv.data[block] = held[index][0]
            done(OpStatus.OK, self._copied([held[index][1] for index in range(len(blocks))]))

        self.under_way.append(Copy("load", job_id, list(blocks), end))

    def save(
        self, blocks: Sequence[int], intact: Callable[[], Sequence[bytes]], done: CopyDone
    ) -> None:
        life = self.generation
        assert blocks and self.caches and not self.loading & set(blocks)

        def end() -> None:
            content = [self._kv.data[block].clone() for block in blocks]
            if life != self.generation:
                done(OpStatus.NO_HOST_SPACE, Copied(0, 0, 0.0))
                return
            for key, data in zip(intact(), content, strict=True):
                if key:
                    self.cache[key] = data
                    self.cache.move_to_end(key)
            self._make_room()
            self.cached_blocks = len(self.cache)
            done(OpStatus.OK, self._copied([BLOCK] * len(blocks)))

        self.under_way.append(Copy("save", "", list(blocks), end))

    def fetch(self, keys: Sequence[bytes], blocks: Sequence[int], done: CopyDone) -> None:
        assert len(keys) == len(blocks) > 0 and not self.busy & set(blocks)
        life = self.generation

        def end() -> None:
            if life != self.generation:
                done(OpStatus.LOST, Copied(0, 0, 0.0))
                return
            run = list(itertools.takewhile(self.cache.__contains__, keys))
            for key, block in zip(run, blocks, strict=False):
                self._kv.data[block] = self.cache[key]
                self.cache.move_to_end(key)
            done(OpStatus.OK, self._copied([BLOCK] * len(run)))

        self.under_way.append(Copy("load", "", list(blocks), end))

    def export(self, job_id: str, blocks: Sequence[BlockRef], to: Place, done: CopyDone) -> None:
        raise AssertionError("there is no other worker")

    def _make_room(self) -> None:
        used = sum(len(blocks) for blocks in self.host.values())
        while self.cache and used + len(self.cache) > self.capacity:
            self.cache.popitem(last=False)

    def release(self, job_id: str, done: CopyDone) -> None:
        def end() -> None:
            self.host.pop(job_id, None)
            done(OpStatus.OK, Copied(0, 0, 0.0))

        self.under_way.append(Copy("release", job_id, [], end))

    @property
    def _kv(self) -> KvCache:
        assert self.kv is not None
        return self.kv

    def _copied(self, valid: list[int]) -> Copied:
        return Copied(sum(valid), len(valid) * self._kv.block_bytes, 0.5)


@dataclass
class Rig:
    """An engine, and what a scheduler would know of it."""

    blocks: int = 100
    capacity: int = 1000
    caches: bool = False
    max_model_len: int = 1000
    eos: frozenset[int] = frozenset()
    jobs: dict[int, NewJob] = field(default_factory=dict)
    output: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    ended: dict[int, OpResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mover = FakeMover(self.capacity, caches=self.caches)
        self.kv = KvCache(CONFIG, self.blocks, BLOCK, torch.float32, torch.device("cpu"))
        self.mover.kv = self.kv
        self.model = FakeModel(self.mover)
        self.engine = Engine(
            self.model,
            self.kv,
            self.mover,
            eos_token_ids=self.eos,
            max_model_len=self.max_model_len,
            vocab_size=VOCAB,
        )
        self.model.pool = self.engine.pool
        self._numbers = itertools.count(1)
        self.plan_id = 0
        self.op_id = 0
        self._unsent: list[NewJob] = []
        self.coming: list[Plan] = []  # that came while the model computed

    # --- what a scheduler says ---------------------------------------------------------------

    def job(
        self,
        prompt: Iterable[int],
        output: Sequence[int] = (),
        *,
        salt: bytes = b"",
        **params: Any,
    ) -> int:
        """The handle of a job that goes out with the next plan."""
        number = next(self._numbers)
        values = {"max_tokens": 1000, "seed": number, **params}
        prompt = list(prompt)
        new = NewJob(
            handle=number,
            job_id=f"job-{number}",
            token_ids=[*prompt, *output],
            prompt_len=len(prompt),
            params=SamplingParams(**values),
            traceparent="",
            salt=salt,
        )
        self.jobs[number], self.output[number] = new, list(output)
        self._unsent.append(new)
        return number

    def resend(self, handle: int, known: int | None = None) -> None:
        """After a reset: the job whole, with the first `known` of its output tokens."""
        old = self.jobs[handle]
        del self.output[handle][known if known is not None else len(self.output[handle]) :]
        tokens = [*old.token_ids[: old.prompt_len], *self.output[handle]]
        self.finished.pop(handle, None)
        self._unsent.append(replace(old, token_ids=tokens))

    def plan(
        self,
        rows: Sequence[int] | dict[int, int] = (),
        ops: Sequence[tuple[OpKind, int] | tuple[OpKind, int, int]] = (),
        lease: int = 1,
    ) -> list[int]:
        """Put a plan in force (rows: handles, or handle -> tokens); the ids of its operations."""
        plan = self._planned(rows, ops, lease)
        self._apply(plan)
        return [op.op_id for op in plan.ops]

    def plan_beside(
        self,
        rows: Sequence[int] | dict[int, int] = (),
        ops: Sequence[tuple[OpKind, int] | tuple[OpKind, int, int]] = (),
        lease: int = 1,
    ) -> tuple[list[int], int]:
        """A plan that comes while the model computes: the ids of its operations, and how many of
        them have begun. It takes effect after the iteration."""
        plan = self._planned(rows, ops, lease)
        begun = self.engine.begin_ops(plan, self.coming)
        self.coming.append(replace(plan, ops=plan.ops[begun:]))
        return [op.op_id for op in plan.ops], begun

    def _apply(self, plan: Plan) -> None:
        self.plan_id = plan.plan_id
        self.engine.apply(plan)

    def _planned(
        self,
        rows: Sequence[int] | dict[int, int],
        ops: Sequence[tuple[OpKind, int] | tuple[OpKind, int, int]],
        lease: int,
    ) -> Plan:
        listed = rows.items() if isinstance(rows, dict) else [(handle, 5) for handle in rows]
        first = self.op_id + 1
        self.op_id += len(ops)
        named = [Op(first + i, *op) for i, op in enumerate(ops)]
        # The engine goes on writing in the lists that it gets.
        new = [replace(job, token_ids=list(job.token_ids)) for job in self._unsent]
        self._unsent.clear()
        plan_id = self.plan_id + len(self.coming) + 1
        return Plan(plan_id, lease, new, list(listed), named)

    def op(self, kind: OpKind, handle: int, blocks: int = 0) -> int:
        """One operation, no rows; its id."""
        return self.plan(ops=[(kind, handle, blocks)])[0]

    def do(self, kind: OpKind, handle: int, blocks: int = 0) -> OpResult:
        """One operation, and every copy ended; its result."""
        number = self.op(kind, handle, blocks)
        self.mover.end_all()
        self.idle()
        return self.ended[number]

    # --- what the engine says ----------------------------------------------------------------

    def step(self) -> Iteration:
        done = self._take(self.engine.step())
        for plan in self.coming:
            self._apply(plan)
        self.coming.clear()
        return done

    def run(self, rows: Sequence[int] | dict[int, int], count: int) -> list[Iteration]:
        """A plan with a lease of `count` iterations, until it ends."""
        self.plan(rows, lease=count)
        done = []
        while self.engine.runnable:
            done.append(self.step())
        return done

    def idle(self) -> Iteration | None:
        report = self.engine.ended_report()
        return self._take(report) if report is not None else None

    def _take(self, iteration: Iteration) -> Iteration:
        assert iteration.plan_id == self.plan_id
        for handle, index, sampled, finish in iteration.sampled:
            assert handle not in self.finished, "a token after the last one"
            assert index == len(self.output[handle])
            self.output[handle].append(sampled.token)
            if finish:
                self.finished[handle] = finish
        self.failed.update(iteration.failed)
        for result in iteration.ops:
            assert result.op_id not in self.ended, "an operation ended twice"
            self.ended[result.op_id] = result
        return iteration

    # --- judgement ---------------------------------------------------------------------------

    def check_output(self) -> None:
        """Every output is the beginning of the undisturbed one."""
        for handle, output in self.output.items():
            job = self.jobs[handle]
            prompt = job.token_ids[: job.prompt_len]
            assert output == undisturbed(prompt, job.params, len(output))

    def check_blocks(self) -> None:
        """Every block is free or has one owner, or several that only read it; copies under way own
        theirs."""
        held = {job.job_id: job for job in self.engine._held.values()}
        owned = Counter(block for job in held.values() for block in job.blocks)
        assert len(owned) + self.engine.pool.free == self.blocks
        for job in held.values():
            for block in job.blocks[job.computed // BLOCK :]:
                assert owned[block] == 1
        for job in held.values():
            assert job.computed <= len(job.blocks) * BLOCK
        for copy in self.mover.under_way:
            if copy.kind != "save":
                holders = [held[copy.job_id]] if copy.job_id else list(held.values())
                assert any(set(copy.blocks) <= set(job.blocks) for job in holders)
