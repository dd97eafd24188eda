"""A model that does not fit into one process, whose shards do: limits of memory by the kernel."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastserve.worker.parallel.launcher import held_port
from support.cgroups import memory_limit
from support.processes import service
from support.prompts import PROMPTS
from support.tiny_models import VOCAB, tiny_model
from support.worker_driver import worker_driver

MIB = 1 << 20
# 150 million weights in layers of equal size and next to nothing beside them: 582 MiB in float32,
# which is memory of the process, since the file has them in bfloat16. A process without a model
# takes some 170 MiB, so one needs 770 MiB in all and each of two ranks 510 at the most.
LAYERS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
LIMIT = 630 * MIB
WORKER = (sys.executable, "-m", "fastserve.worker")
COUNT = 10  # tokens of an answer
FLAGS = (
    *("--worker-id", "w", "--block-size", "8", "--kv-blocks", "32", "--max-model-len", "128"),
    *("--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--shutdown-timeout", "1"),
    *("--dtype", "float32", "--device", "cpu", "--threads", "1"),
)


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    tiny_model(folder, **LAYERS).bfloat16().save_pretrained(folder)
    return folder


def _flags(folder: Path, model: Path, *more: str) -> list[str]:
    return [*FLAGS, "--listen", f"unix:{folder}/w", "--model", str(model), *more]


async def _answers(address: str) -> dict[str, list[int]]:
    """Greedy and sampled."""
    prompts = [[2 + byte % (VOCAB - 2) for byte in text.encode()[:20]] for text in PROMPTS[:3]]
    async with worker_driver(address) as driver:
        for at, prompt in enumerate(prompts):
            name = driver.job(f"j{at}", prompt, temperature=0.5 * at, seed=at, top_k=9)
            await driver.generate(name, COUNT, chunk=64)
        return driver.output


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_model_that_only_fits_as_a_group(tmp_path: Path, large_model: Path) -> None:
    alone = _flags(tmp_path, large_model, "--cpu-kernels", "torch")
    with service("fastserve.worker", tmp_path, *alone) as worker:
        expected = await _answers(worker.info["address"])
    with memory_limit(LIMIT) as limit:
        killed = subprocess.run(
            [*limit.inside, *WORKER, *alone],
            check=False,
            capture_output=True,
            timeout=120,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert limit.kills == 1
        assert '"mib": 582' in killed.stderr.decode()  # it said what it needs
    for shape in ("--tensor-parallel-size", "--pipeline-parallel-size"):
        flags = _flags(tmp_path, large_model, shape, "2")
        with contextlib.ExitStack() as stack:
            limits = [stack.enter_context(memory_limit(LIMIT)) for _ in range(2)]
            port = stack.enter_context(held_port()).getsockname()[1]
            common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            ranks = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
            follower = stack.enter_context(
                subprocess.Popen(
                    [*limits[1].inside, *WORKER, *flags], env={**os.environ, **ranks[1]}
                )
            )
            stack.callback(follower.kill)  # before it is waited for
            with service(
                "fastserve.worker", tmp_path, *flags, env=ranks[0], prefix=limits[0].inside
            ) as leader:
                assert await _answers(leader.info["address"]) == expected
            assert follower.wait(timeout=30) == 0
            assert [limit.kills for limit in limits] == [0, 0]


@pytest.mark.slow
def test_who_killed_a_rank_is_told(tmp_path: Path, large_model: Path) -> None:
    with memory_limit(LIMIT) as limit:  # for the whole group
        flags = _flags(tmp_path, large_model, "--tensor-parallel-size", "2")
        group = subprocess.run(
            [*limit.inside, *WORKER, *flags],
            check=False,
            capture_output=True,
            timeout=120,
        )
        assert limit.kills >= 1
    assert group.returncode == 2
    last = group.stderr.decode().splitlines()[-1]
    assert re.match(r"fastserve-worker: the group ends: rank [01] was killed \(SIGKILL\), .*", last)
    assert "want of memory" in last
