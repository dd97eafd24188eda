"""What the scheduler core costs: `make bench-scheduler`.

Times plans, reports and submissions of the real core with full batches and long queues, and counts
the memory of a queued job. Every iteration brings a report of all rows, some jobs end, as many
arrive. Counted is the processor time of the thread: what else the machine does is not in it.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import TypeVar

from fastserve.bench.sim.hardware import OPT_13B
from fastserve.bench.sim.types import SimOptions
from fastserve.bench.sim.worker import SimWorker
from fastserve.scheduler.core import (
    CostSample,
    Inventory,
    JobSpec,
    Scheduler,
    SchedulerConfig,
    WorkerInfo,
)

T = TypeVar("T")
_PROMPT, _OUTPUT = 40, 300  # tokens, at the most
_SETTLE = 200  # iterations before the measurement
_CASES = ((16, 1000), (64, 100), (64, 10_000), (64, 100_000), (256, 10_000))  # rows, queued


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", nargs="+", default=["skip-join-mlfq", "fastserve"])
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--tenants", type=int, default=1, help="spread the jobs over so many")
    arguments = parser.parse_args()
    for policy in arguments.policy:
        print(f"policy {policy}, microseconds: median / P99 / largest")
        print(f"{'rows':>5} {'queued':>7} {'plan':>20} {'report':>20} {'submit':>20}")
        for rows, queued in _CASES:
            times = _measure(policy, rows, queued, arguments.iterations, arguments.tenants)
            cells = " ".join(f"{_cell(times[name]):>20}" for name in ("plan", "report", "submit"))
            print(f"{rows:>5} {queued:>7} {cells}", flush=True)
        print(f"memory of a queued job beside its tokens: {_bytes_per_job(policy):.0f} bytes")


def _cell(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    shown = (statistics.median(ordered), ordered[int(0.99 * len(ordered))], ordered[-1])
    return " / ".join(f"{value * 1e6:.0f}" for value in shown)


def _measure(
    policy: str, rows: int, queued: int, iterations: int, tenants: int = 1
) -> dict[str, list[float]]:
    options = SimOptions(policy, OPT_13B, max_num_seqs=rows, host_kv_tokens=10_000_000)
    core, worker = _start(options, queued + 10 * rows)
    lengths = random.Random(0)
    times: dict[str, list[float]] = {"plan": [], "report": [], "submit": []}
    number = 0
    now = 0.0

    def submit() -> None:
        nonlocal number
        prompt, output = lengths.randint(1, _PROMPT), lengths.randint(1, _OUTPUT)
        tenant = f"tenant-{number % tenants}"
        spec = JobSpec(str(number), range(prompt), output, now, tenant=tenant)
        number += 1
        assert _timed(times["submit"], lambda: core.submit(spec, now)) is None

    while number < queued + rows:
        submit()
    gc.collect()
    gc.freeze()  # as a service with a long queue would: what is there stays
    for iteration in range(_SETTLE + iterations):
        if iteration == _SETTLE:
            for values in times.values():
                values.clear()
        moment = now
        plan = _timed(times["plan"], lambda: core.plan("sim", moment))  # noqa: B023
        if plan is not None:
            worker.receive(plan, now)
        now, report = worker.iterate(now)
        at, what = now, report
        progress = _timed(times["report"], lambda: core.on_report("sim", what, at))  # noqa: B023
        core.drain_events()
        for ended in progress.finished:
            worker.forget(ended.job_id)
            submit()
    gc.unfreeze()
    return times


def _start(options: SimOptions, most: int) -> tuple[Scheduler, SimWorker]:
    info = WorkerInfo(
        worker_id="sim",
        block_size=options.block_size,
        device_blocks=60_000,  # about a million tokens: rows and queue are what is measured
        host_blocks=options.host_kv_tokens // options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=4096,
        prefill_sample=CostSample(1, 512, 512, 0.07),
        decode_sample=CostSample(1, 1, 256, 0.02),
    )
    core = Scheduler(SchedulerConfig(policy=options.policy, max_queued_jobs=most))
    core.add_worker(info, Inventory(), 0.0)
    return core, SimWorker(options, info)


def _timed(into: list[float], call: Callable[[], T]) -> T:
    started = time.thread_time()
    result = call()
    into.append(time.thread_time() - started)
    return result


def _bytes_per_job(policy: str, jobs: int = 10_000) -> float:
    core, _ = _start(SimOptions(policy, OPT_13B), jobs)
    specs = [JobSpec(f"chatcmpl-{n:032d}", range(_PROMPT), _OUTPUT, 0.0) for n in range(jobs)]
    gc.collect()
    tracemalloc.start()
    for spec in specs:
        core.submit(spec, 0.0)
    core.drain_events()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / jobs


if __name__ == "__main__":
    main()
