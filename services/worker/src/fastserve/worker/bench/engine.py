"""`python -m fastserve.worker.bench.engine`: the model's steps against the limits of the machine.

A step is one call of the model: attention over contexts of the given length and logits for every
row, without sampling and without a scheduler. Beside it stands its limit: the larger of the bytes
that it must read over the speed of memory, and its operations over the speed of matrix products in
the same number format, which for attention is that of the KV cache. All speeds are measured in the
same run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from fastserve.common.errors import StartupError
from fastserve.worker.bench.limits import Clock, Limits, best, measure_limits
from fastserve.worker.model.batch import Batch
from fastserve.worker.model.choose import AnyModel, Way, choose, load
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.files import DEFAULT_MODEL, prepare
from fastserve.worker.model.kv_cache import KvCache

_BLOCK = 16
_BATCHES = (1, 8, 32, 64)
_CONTEXTS = (256, 1024)
_PREFILLS = (128, 512, 2048)


@dataclass(frozen=True, slots=True)
class Measured:
    """One kind of step. seconds: the best of several; limit: seconds that no engine goes below."""

    kind: str  # decode or prefill
    rows: int
    context: int
    seconds: float
    limit: float
    bound: str  # which speed limits it: memory or arithmetic

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        return (self.rows if self.kind == "decode" else self.context) / self.seconds

    @property
    def ratio(self) -> float:
        """1: as fast as can be."""
        return self.limit / self.seconds


def parameters(config: ModelConfig, chosen: float | None = None) -> tuple[float, int]:
    """Weights in all layers, and in the head. chosen: experts that count (None: all)."""
    layers = sum(config.layer_weights(layer, chosen) for layer in range(config.num_layers))
    return layers, config.hidden_size * config.vocab_size


def _experts(config: ModelConfig, tokens: int) -> tuple[float, float]:
    """Experts of a layer that a token computes, and that `tokens` of them read together, on
    average and if they choose evenly."""
    if config.experts is None:
        return 0, 0
    count, each = config.experts.count, config.experts.per_token
    return each, count * (1 - (1 - each / count) ** tokens)


def weight_bytes(way: Way) -> float:
    """Bytes per weight."""
    return 1.0 if way.int8 else float(way.dtype.itemsize)


def limit_of(
    config: ModelConfig, way: Way, limits: Limits, *, rows: int, tokens: int, context: int
) -> tuple[float, str]:
    """Least seconds of a step of `rows` rows with `tokens` new tokens each, which end at `context`,
    and what limits it."""
    each, together = _experts(config, rows * tokens)
    layers, head = parameters(config, each)
    read_layers, _ = parameters(config, together)
    pairs = rows * sum(range(context - tokens + 1, context + 1))  # of a query and a key
    attention = 4 * pairs * config.num_layers * config.num_heads * config.head_dim
    products = 2 * (layers * rows * tokens + head * rows)
    kv = 2 * config.num_kv_heads * config.head_dim * config.num_layers * way.dtype.itemsize
    read = (read_layers + head) * weight_bytes(way) + rows * context * kv
    memory = read / limits.read
    arithmetic = products / limits.operations + attention / limits.attention
    return max((memory, "memory"), (arithmetic, "arithmetic"))


def run(
    model: AnyModel,
    way: Way,
    limits: Limits,
    seconds: float,
    clock: Clock = time.perf_counter,
) -> list[Measured]:
    """Measure every kind of step that fits the model, each for about `seconds`."""
    found = []
    longest = model.config.max_position_embeddings
    blocks = max(_BATCHES) * (max(_CONTEXTS) // _BLOCK)
    kv = KvCache(model.config, blocks, _BLOCK, model.dtype, model.device)
    kinds = [(rows, 1, context) for context in _CONTEXTS for rows in _BATCHES]
    kinds += [(1, length, length) for length in _PREFILLS]
    for rows, tokens, context in kinds:
        if context > longest:
            continue
        each = -(-context // _BLOCK)
        batch = Batch(
            token_ids=[i % 1000 for i in range(rows * tokens)],
            query_lens=[tokens] * rows,
            context_lens=[context] * rows,
            block_tables=[list(range(row * each, (row + 1) * each)) for row in range(rows)],
            logit_rows=list(range(rows)),
        )
        step = partial(_step, model, batch, kv)
        spent = best(step, seconds, clock)
        limit, bound = limit_of(
            model.config, way, limits, rows=rows, tokens=tokens, context=context
        )
        kind = "decode" if tokens == 1 else "prefill"
        found.append(Measured(kind, rows, context, spent, limit, bound))
    return found


def _step(model: AnyModel, batch: Batch, kv: KvCache) -> None:
    logits = model.forward(batch, kv)
    if logits.device.type == "cuda":
        torch.cuda.synchronize(logits.device)


def table(found: Sequence[Measured]) -> str:
    """The measurements for people."""
    lines = [
        f"{'step':8} {'rows':>5} {'context':>8} {'ms':>9} {'tokens/s':>9} {'limit ms':>9} "
        f"{'of limit':>8}  bound by"
    ]
    lines += [
        f"{one.kind:8} {one.rows:5} {one.context:8} {one.seconds * 1e3:9.2f} "
        f"{one.tokens_per_second:9.0f} {one.limit * 1e3:9.2f} {one.ratio:8.0%}  {one.bound}"
        for one in found
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="fastserve bench engine",
        description="Time the model's steps against the limits of this machine.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder, .gguf file or the default")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--quantization", default="none", help="none or int8")
    parser.add_argument("--cpu-kernels", default="auto", help="auto, native or torch")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: all cores)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line of the table")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time of one thread, for a machine that has other work to do",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args()
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time sees one thread: add --threads 1")
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    try:
        folder = prepare(arguments.model, progress=lambda line: print(line, file=sys.stderr))
        way = choose(
            ModelConfig.from_folder(folder),
            device=arguments.device,
            dtype=arguments.dtype,
            quantization=arguments.quantization,
            cpu_kernels=arguments.cpu_kernels,
            threads=arguments.threads,
        )
        model = load(folder, way)
    except StartupError as error:
        print(error, file=sys.stderr)
        return 2
    kv = str(way.dtype).removeprefix("torch.")
    numbers = "int8" if way.int8 else kv
    limits = measure_limits(numbers, kv, arguments.seconds, clock)
    found = run(model, way, limits, arguments.seconds, clock)
    if arguments.json:
        rows = [
            {**asdict(one), "tokens_per_second": one.tokens_per_second, "ratio": one.ratio}
            for one in found
        ]
        print(json.dumps({"runs": way.description, "limits": asdict(limits), "steps": rows}))
        return 0
    print(f"{folder.name}: {way.description}")
    print(
        f"limits: memory {limits.read / 1e9:.1f} GB/s, {numbers} products "
        f"{limits.operations / 1e9:.0f} Gop/s, attention in {kv} {limits.attention / 1e9:.0f} Gop/s"
    )
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
