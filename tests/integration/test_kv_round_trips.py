"""Preemption leaves no trace: whatever is done to a KV cache at whatever iteration, its bytes come
back as they left, and the greedy text is that of a run in which nothing happened.

The real model, engine, staging and sidecar; the engine runs in the process of the test, which
compares every block (`WatchedMover`). vllm #29781, #46951: wrong text under load with offloading.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fastserve.gateway.tokenizer import Tokenizer
from fastserve.worker.model.choose import AnyModel, choose, load
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.kv_cache import block_bytes
from fastserve.worker.model.llama import Model
from fastserve.worker.model.loader import load_model
from support.gateway_client import JobView, connected
from support.local_worker import LocalWorker, local_worker
from support.processes import Running, service
from support.prompts import hundred_prompts
from support.schedulers import RunningScheduler, running_scheduler
from support.tiny_models import byte_tokenizer, tiny_model
from support.valkey import running_valkey
from support.waiting import eventually
from support.worker_driver import DROP_DEVICE, LOST, OFFLOAD, OK, RELEASE, UPLOAD, worker_driver

TOKENS = 24  # of every answer
MOST = 56  # of a prompt
DEVICE = 200  # tokens: two and a half of the longest jobs fit
ROOMY = 1600
# Tokens in host memory and on the disk: all jobs of a load fit, on the host, or all but the two
# that were put aside last on the disk.
TIERS = {"host": (9600, 0), "disk": (2 * (MOST + TOKENS), 9600)}
# How KV caches make room, through which tier; the last two have no use for one.
STRATEGIES = [
    ("proactive", "host"),
    ("proactive", "disk"),
    ("reactive", "host"),
    ("reactive", "disk"),
    ("recompute", "host"),
    ("defer", "host"),
]


@dataclass
class Texts:
    """Prompts as token ids, and what the model makes of each when it runs alone."""

    model: AnyModel
    block: int  # tokens in a KV block
    prompts: list[list[int]]
    expected: list[list[int]]
    seconds_of: Callable[[int], float] | None = None  # as for `local_worker`


async def undisturbed(
    model: AnyModel, block: int, folder: Path, prompts: Sequence[Sequence[int]]
) -> Texts:
    expected = []
    async with (
        local_worker(model, folder, blocks=ROOMY // block, block_size=block) as worker,
        worker_driver(worker.address) as driver,
    ):
        for number, prompt in enumerate(prompts):
            job = driver.job(f"alone-{number}", prompt, temperature=0.0)
            expected.append(list(await driver.generate(job, TOKENS, chunk=MOST)))
            await driver.op(RELEASE, job)
    return Texts(model, block, [list(prompt) for prompt in prompts], expected)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(folder)
    return load_model(folder, torch.float32, torch.device("cpu"))


def _of_a_larger_model(tokens: int) -> float:
    """Seconds of an iteration, for a scheduler that asks whether it is quicker to copy KV or to
    compute it again. A tiny model is about as fast as copies, so whether there are any would depend
    on the load of the machine; this one is slower, but for short jobs when few are left."""
    return 0.1 + 0.001 * tokens


_computed: dict[str, Texts] = {}  # the undisturbed runs, by fixture: once is enough


@pytest.fixture
async def quick(tiny: Model, tmp_path: Path) -> Texts:
    """A fifth of the prompts and a tiny model, in PyTorch."""
    if "quick" not in _computed:
        prompts = [byte_tokenizer().encode(text).ids[:MOST] for text in hundred_prompts()[::5]]
        texts = await undisturbed(tiny, 8, tmp_path, prompts)
        _computed["quick"] = replace(texts, seconds_of=_of_a_larger_model)
    return _computed["quick"]


@pytest.fixture(scope="module")
def default_model(default_model_folder: Path) -> AnyModel:
    return load(default_model_folder, choose(ModelConfig.from_folder(default_model_folder)))


@pytest.fixture
async def whole(default_model: AnyModel, default_tokenizer: Tokenizer, tmp_path: Path) -> Texts:
    """All prompts and the default model, as a worker runs it if nothing is said: on a CPU with
    kernels and bfloat16."""
    if "whole" not in _computed:
        prompts = [default_tokenizer.encode(text)[:MOST] for text in hundred_prompts()]
        _computed["whole"] = await undisturbed(default_model, 16, tmp_path, prompts)
    return _computed["whole"]


@contextlib.contextmanager
def sidecar(folder: Path, texts: Texts, tier: str) -> Iterator[Running]:
    host, disk = (tokens // texts.block for tokens in TIERS[tier])
    flags = ["--listen", f"unix:{folder}/kv", "--pool-dir", str(folder)]
    flags += ["--host-blocks", str(host)]
    if disk:
        size = block_bytes(texts.model.config, texts.block, texts.model.dtype)
        size = -(-size // 4096) * 4096
        flags += ["--disk-path", str(folder), "--disk-size", str(disk * size)]
    with service("fastserve.kv_offload", folder, *flags) as running:
        yield running


@contextlib.asynccontextmanager
async def watched(texts: Texts, folder: Path, tier: str) -> AsyncIterator[LocalWorker]:
    """A worker whose blocks are compared; at the end the tier was used and everything is free."""
    blocks = DEVICE // texts.block
    with sidecar(folder, texts, tier) as process:
        async with local_worker(
            texts.model,
            folder,
            blocks=blocks,
            block_size=texts.block,
            sidecar=process.info["address"],
            seconds_of=texts.seconds_of,
        ) as worker:
            yield worker
            await eventually(lambda: worker.free_blocks == blocks, "free device blocks")
        assert worker.mover.different == []
        read = 'fastserve_kv_tier_bytes_total{direction="in",tier="disk"}'
        if tier == "disk":
            assert process.metrics().get(read), "nothing came from the disk"


# --- by hand: any job at any iteration ------------------------------------------------------------


async def by_hand(texts: Texts, folder: Path, tier: str, seed: int) -> None:
    """Jobs run for a few tokens at a time, in any order; each is offloaded, or dropped, between."""
    numbers = random.Random(seed)
    async with (
        watched(texts, folder, tier) as worker,
        worker_driver(worker.address) as driver,
    ):
        names = [
            driver.job(f"j{number}", prompt, temperature=0.0)
            for number, prompt in enumerate(texts.prompts)
        ]
        running, stored = list(names), set[str]()
        while running:
            job = numbers.choice(running)
            if job in stored or driver.output[job]:
                back = await driver.op(UPLOAD, job)
                assert back.status == (OK if job in stored else LOST)
            have = len(driver.output[job])
            await driver.generate(job, min(TOKENS, have + numbers.randint(1, 9)), chunk=MOST)
            if len(driver.output[job]) == TOKENS:
                running.remove(job)
                await driver.op(RELEASE, job)
            elif numbers.random() < 0.2:
                await driver.op(DROP_DEVICE, job)  # what it has on the host may be older
            else:
                assert (await driver.op(OFFLOAD, job)).status == OK
                stored.add(job)
        assert [driver.output[job] for job in names] == texts.expected
        assert worker.mover.blocks["compared"] > 3 * len(names)


@pytest.mark.parametrize("tier", TIERS)
async def test_bytes_and_text_survive_by_hand(quick: Texts, tmp_path: Path, tier: str) -> None:
    await by_hand(quick, tmp_path, tier, seed=1)


@pytest.mark.parametrize("architecture", ["Mixtral", "Gemma"])
async def test_bytes_and_text_survive_in_other_families(tmp_path: Path, architecture: str) -> None:
    tiny_model(tmp_path / "model", architecture, tie_word_embeddings=architecture == "Gemma")
    model = load_model(tmp_path / "model", torch.float32, torch.device("cpu"))
    prompts = [byte_tokenizer().encode(text).ids[:MOST] for text in hundred_prompts()[::25]]
    texts = await undisturbed(model, 8, tmp_path, prompts)
    await by_hand(texts, tmp_path, "host", seed=3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tier", TIERS)
async def test_hundred_prompts_by_hand(whole: Texts, tmp_path: Path, tier: str) -> None:
    await by_hand(whole, tmp_path, tier, seed=2)


# --- by the scheduler, with every strategy --------------------------------------------------------


async def by_scheduler(
    texts: Texts, folder: Path, strategy: str, tier: str, seed: int, timeout: float
) -> None:
    """All prompts at once, in memory for two and a half; urgent jobs break in at random moments."""
    with running_valkey() as valkey:
        async with (
            watched(texts, folder, tier) as worker,
            running_scheduler(
                valkey,
                worker.address,
                policy="skip-join-mlfq",
                kv_strategy=strategy,
                leader_ttl=30.0,
                redis_timeout=10.0,
            ) as scheduler,
        ):
            views = await _answers(scheduler, texts, random.Random(seed), timeout)
            assert [view.tokens for view in views] == texts.expected
            counters = dict((await scheduler.snapshot()).counters)
            preempted = {
                mode: sum(n for key, n in counters.items() if key.endswith(f".{mode}"))
                for mode in ("swap", "recompute", "resident")
            }
            again = counters.get("tokens.recomputed", 0)
            match strategy:
                case "proactive":  # also computes again what that is cheaper for
                    assert preempted["swap"] and worker.mover.blocks["compared"]
                case "reactive":
                    assert preempted["swap"] and worker.mover.blocks["compared"]
                    assert again < sum(map(len, texts.prompts)), "it recomputed instead"
                case "recompute":
                    assert preempted["recompute"] and again
                    assert not worker.mover.blocks["stored"]
                case "defer":
                    assert preempted["resident"], "nobody was preempted"


async def _answers(
    scheduler: RunningScheduler, texts: Texts, numbers: random.Random, timeout: float
) -> list[JobView]:
    greedy = {"temperature": 0.0, "ignore_eos": True}
    async with connected(scheduler.address) as gateway:
        await eventually(lambda: gateway.welcome.ready, "the worker's stream")
        views = [
            await gateway.submit(f"j{number}", prompt=prompt, max_tokens=TOKENS, sampling=greedy)
            for number, prompt in enumerate(texts.prompts)
        ]

        def tokens() -> int:
            return sum(len(view.tokens) for view in views)

        total, moment = len(views) * TOKENS, 0
        while (moment := moment + numbers.randint(8, 40)) < total:
            await eventually(lambda: tokens() >= moment, f"{moment} tokens", timeout)
            prompt = [numbers.randrange(2, 300) for _ in range(numbers.randint(8, MOST))]
            urgent = await gateway.submit(
                f"urgent-{moment}", prompt=prompt, max_tokens=2, sampling=greedy, priority=-1
            )
            await urgent.finished(timeout)
        for view in views:
            await view.finished(timeout)
            assert not view.error
    return views


@pytest.mark.parametrize(("strategy", "tier"), STRATEGIES)
async def test_bytes_and_text_survive_every_strategy(
    quick: Texts, tmp_path: Path, strategy: str, tier: str
) -> None:
    await by_scheduler(quick, tmp_path, strategy, tier, seed=3, timeout=30.0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("strategy", "tier"), STRATEGIES)
async def test_hundred_prompts_with_every_strategy(
    whole: Texts, tmp_path: Path, strategy: str, tier: str
) -> None:
    await by_scheduler(whole, tmp_path, strategy, tier, seed=4, timeout=1200.0)
