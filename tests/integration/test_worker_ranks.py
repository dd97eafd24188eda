"""Groups of ranks, as processes: the tokens of one process, and what happens when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastserve.gateway.tokenizer import Tokenizer
from support.pod import Pod, beginnings_come_from_the_host
from support.prompts import PROMPTS
from support.tiny_models import VOCAB, tiny_model
from support.worker_driver import OFFLOAD, OK, RELEASE, UPLOAD, WorkerDriver

PROMPTS_OF_BYTES = [[2 + byte % (VOCAB - 2) for byte in text.encode()[:40]] for text in PROMPTS]
COUNT = 12  # tokens of an answer of a tiny model
ENOUGH = 48  # blocks on the device, for four jobs
NINE_HEADS = {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3}
FOUR_KV_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
# Penalties and log-probabilities want whole rows, top_k some candidates, greedy one.
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.9, "seed": 5, "top_k": 9},
    {"temperature": 0.8, "seed": 77, "top_p": 0.95},
]

Ask = Callable[[Pod], Awaitable[dict[str, list[int]]]]


async def answers(pod: Pod, prompts: list[list[int]], count: int) -> dict[str, list[int]]:
    """`count` tokens each. Four jobs at a time in one batch, all of them interrupted: their KV
    leaves and comes back."""
    async with pod.driver() as driver:
        for first in range(0, len(prompts), 4):
            names = [
                driver.job(f"j{at}", prompts[at], max_tokens=count, **WAYS[at % 4])
                for at in range(first, min(first + 4, len(prompts)))
            ]
            await _run(driver, names, count // 2)
            for name in names:
                assert (await driver.op(OFFLOAD, name)).status == OK
            for name in reversed(names):
                assert (await driver.op(UPLOAD, name)).status == OK
            await _run(driver, names, count)
            for name in names:
                await driver.op(RELEASE, name)
        assert not driver.failed
        return driver.output


async def _run(driver: WorkerDriver, names: list[str], count: int) -> None:
    """Until each job has `count` tokens or a few more; a prefill goes in chunks of 16."""
    while short := [name for name in names if len(driver.output[name]) < count]:
        before = driver.iterations
        await driver.plan(dict.fromkeys(short, 16), lease=1)
        await driver.until(lambda before=before: driver.iterations > before)  # type: ignore[misc]


def _pod(
    folder: Path, model: Path, stack: contextlib.ExitStack, *flags: str, ranks: int = 1
) -> Pod:
    folder.mkdir(exist_ok=True)
    return Pod(folder, model, stack, ENOUGH, 64, worker_flags=flags, ranks=ranks)


class Known:
    """Models and what a single process answers, each found out once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokens: dict[str, dict[str, list[int]]] = {}

    def tiny(self, changes: dict[str, Any]) -> Path:
        model = self._folder / "-".join(["tiny", *(f"{k}{v}" for k, v in changes.items())])
        if not model.exists():
            tiny_model(model, **changes)
        return model

    async def tokens(self, model: Path, ask: Ask) -> dict[str, list[int]]:
        if model.name not in self._tokens:
            with contextlib.ExitStack() as stack:
                folder = self._folder / f"{model.name}.one"
                self._tokens[model.name] = await ask(
                    _pod(folder, model, stack, "--cpu-kernels=torch")
                )
        return self._tokens[model.name]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return Known(tmp_path_factory.mktemp("known"))


async def agrees(
    known: Known, model: Path, folder: Path, tp: int, pp: int, ask: Ask, *flags: str
) -> None:
    """A group of this shape gives the tokens of a single process."""
    expected = await known.tokens(model, ask)
    with contextlib.ExitStack() as stack:
        shape = (f"--tensor-parallel-size={tp}", f"--pipeline-parallel-size={pp}")
        pod = _pod(folder, model, stack, *shape, *flags, ranks=tp * pp)
        found = await ask(pod)
        assert {name: tokens for name, tokens in found.items() if tokens != expected[name]} == {}
        kinds = {name for name in pod.metrics() if name.startswith("fastserve_comm_seconds_count")}
        assert ("reduce" in str(kinds)) and "plan" in str(kinds)


@pytest.mark.parametrize(
    ("tp", "pp", "changes", "flags"),
    [
        (2, 2, NINE_HEADS, ()),
        pytest.param(3, 1, NINE_HEADS, (), marks=pytest.mark.slow),
        pytest.param(2, 1, NINE_HEADS, (), marks=pytest.mark.slow),  # 6 and 3 heads
        pytest.param(2, 1, FOUR_KV_HEADS, (), marks=pytest.mark.slow),
        pytest.param(4, 1, {}, (), marks=pytest.mark.slow),  # 2 KV heads: replicated
        pytest.param(1, 2, {}, (), marks=pytest.mark.slow),
        pytest.param(1, 3, {}, (), marks=pytest.mark.slow),
        pytest.param(2, 2, {}, ("--communication=distributed",), marks=pytest.mark.slow),
    ],
)
async def test_a_group_gives_the_tokens_of_one_process(
    tmp_path: Path, known: Known, tp: int, pp: int, changes: dict[str, Any], flags: tuple[str, ...]
) -> None:
    async def ask(pod: Pod) -> dict[str, list[int]]:
        return await answers(pod, PROMPTS_OF_BYTES[:8], COUNT)

    await agrees(known, known.tiny(changes), tmp_path, tp, pp, ask, *flags)


@pytest.mark.slow
async def test_beginnings_come_from_the_host_at_every_rank(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model(model)
    with contextlib.ExitStack() as stack:
        flags = ("--tensor-parallel-size=2",)
        pod = Pod(tmp_path, model, stack, 12, 16, worker_flags=flags, ranks=2)
        await beginnings_come_from_the_host(pod)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("tp", "pp"), [(3, 1), (2, 1), (1, 2), (1, 3), (2, 2)])
async def test_the_default_model_in_ranks_on_fifty_prompts(
    tmp_path: Path,
    known: Known,
    default_model_folder: Path,
    default_tokenizer: Tokenizer,
    tp: int,
    pp: int,
) -> None:
    prompts = [default_tokenizer.encode(text)[:56] for text in PROMPTS]
    assert len(prompts) == 50

    async def ask(pod: Pod) -> dict[str, list[int]]:
        return await answers(pod, prompts, 24)

    await agrees(known, default_model_folder, tmp_path, tp, pp, ask)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGSTOP, marks=pytest.mark.slow),  # noticed by its silence alone
    ],
)
async def test_a_rank_that_is_lost_takes_the_group_down_and_jobs_go_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    model = tmp_path / "model"
    tiny_model(model)
    prompts = PROMPTS_OF_BYTES[:1]
    with contextlib.ExitStack() as stack:
        pod = _pod(tmp_path / "group", model, stack, "--tensor-parallel-size=2", ranks=2)
        async with pod.driver() as driver:
            name = driver.job("a", prompts[0], temperature=0.0)
            expected = list(await driver.generate(name, 60))
        async with pod.driver() as driver:
            driver.job("b", prompts[0], temperature=0.0)
            await driver.plan({"b": 64}, lease=60)
            await driver.until(lambda: len(driver.output["b"]) >= 5)
            launcher = psutil.Process(pod.worker.process.pid)
            ranks = launcher.children()
            assert len(ranks) == 2
            ranks[1].send_signal(number)
            # Under load: iterations go on until the loss is noticed.
            gone, alive = await asyncio.to_thread(psutil.wait_procs, [launcher, *ranks], 20.0)
            assert not alive, (gone, alive)
            output = driver.output
        pod.start_worker()
        async with pod.driver(output) as driver:
            driver.job("b", prompts[0], temperature=0.0)
            assert await driver.generate("b", 60) == expected
