"""The simulator: times that can be worked out by hand, and the core left as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastserve.bench.arrivals import Arrivals
from fastserve.bench.report import service_jain_index
from fastserve.bench.sim.engine import simulate
from fastserve.bench.sim.hardware import OPT_13B, Hardware, load_hardware
from fastserve.bench.sim.types import SimJob, SimOptions, SimResult
from fastserve.bench.workloads import generate
from fastserve.scheduler.core import KvStrategy
from fastserve.scheduler.core.policies import POLICIES

# 10 ms + 1 ms per prompt token; 10 ms + 1 ms per row, context is free.
SIMPLE = Hardware(
    "simple", (0.01, 0.001, 0.0), (0.01, 0.0, 0.001), (0.01, 0.0, 0.001), 99, None, 1000
)


def run(jobs: list[SimJob], policy: str = "fcfs", **options: object) -> SimResult:
    return simulate(jobs, SimOptions(policy, SIMPLE, **options))  # type: ignore[arg-type]


def test_one_job_takes_what_the_formula_says() -> None:
    result = run([SimJob(5.0, 100, 4)])
    assert result.first_token_s[0] == pytest.approx(5.0 + 0.110)
    assert result.end_s[0] == pytest.approx(5.0 + 0.110 + 3 * 0.011)
    assert result.makespan_s == pytest.approx(0.143)


def test_a_long_prompt_comes_in_chunks_that_add_up() -> None:
    quadratic = Hardware("q", (0.01, 0.001, 1e-5), (0.01, 0.0, 0.0), (0.01, 0.0, 0.0), 99, None, 1)
    options = SimOptions("fcfs", quadratic, max_num_batched_tokens=40)
    result = simulate([SimJob(0.0, 100, 1)], options)
    assert result.end_s[0] == pytest.approx(3 * 0.01 + 0.1 + 1e-5 * 100 * 100)


def test_a_mixed_iteration_pays_the_constant_term_once() -> None:
    assert SIMPLE.iteration_s([(0, 50)], 3, 1000) == pytest.approx(0.01 + 0.05 + 0.003)


def test_with_one_row_fcfs_serves_one_after_the_other() -> None:
    result = run([SimJob(0.0, 10, 2), SimJob(0.0, 10, 2)], max_num_seqs=1)
    assert list(result.end_s) == pytest.approx([0.031, 0.062])


def test_a_short_job_overtakes_with_skip_join() -> None:
    jobs = [SimJob(0.0, 10, 400), SimJob(1.0, 10, 2)]
    behind = run(jobs, max_num_seqs=1)
    before = run(jobs, "skip-join-mlfq", max_num_seqs=1)
    assert behind.end_s[1] > behind.end_s[0]
    assert before.end_s[1] - 1.0 < 0.1
    assert before.preemptions >= 1


def test_a_copy_takes_its_bytes_over_the_bandwidth() -> None:
    """Device memory for one job: the long one leaves for the short one and comes back."""
    slow = {"kv_tokens": 480, "host_kv_tokens": 4800, "max_num_seqs": 2}
    jobs = [SimJob(0.0, 320, 100), SimJob(0.5, 160, 40)]
    fast = run(jobs, "skip-join-mlfq", pcie_gbps=1000.0, **slow)
    # 1000 bytes a token: about 350 tokens take 0.35 s each way at 1 MB/s.
    late = run(jobs, "skip-join-mlfq", pcie_gbps=0.001, **slow)
    assert fast.offloaded_tokens > 300 and fast.uploaded_tokens > 300
    assert late.end_s[0] - fast.end_s[0] > 0.3


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("strategy", list(KvStrategy))
def test_every_job_ends_whatever_the_policy_and_the_strategy(
    policy: str, strategy: KvStrategy
) -> None:
    jobs = generate("sharegpt", 120, 3, Arrivals("poisson"), 4.0)
    options = SimOptions(policy, OPT_13B, kv_tokens=6000, host_kv_tokens=9000, kv_strategy=strategy)
    result = simulate(jobs, options)
    assert result.failed == 0 and not np.isnan(result.end_s).any()
    assert (result.first_token_s <= result.end_s).all()
    assert (result.first_token_s > result.arrival_s).all()
    if strategy is KvStrategy.RECOMPUTE:
        assert result.offloaded_tokens == 0


def test_what_can_never_fit_fails_and_counts_as_failed() -> None:
    result = run([SimJob(0.0, 100, 4), SimJob(0.0, 1000, 4)], kv_tokens=512)
    assert result.failed == 1
    assert list(np.isnan(result.end_s)) == [False, True]


def test_the_same_input_gives_the_same_result() -> None:
    jobs = generate("alpaca", 300, 1, Arrivals("gamma", 3.0), 20.0)
    options = SimOptions("fastserve", OPT_13B, kv_tokens=3000, host_kv_tokens=20_000)
    first, second = simulate(jobs, options), simulate(jobs, options)
    assert (first.end_s == second.end_s).all()
    assert first.preemptions == second.preemptions > 0


def test_progress_is_told() -> None:
    heard: list[int] = []
    simulate([SimJob(0.0, 5, 1)] * 600, SimOptions("fcfs", SIMPLE), heard.append)
    assert heard == sorted(heard) and heard[-1] == 600 and len(heard) >= 3


# The cost model file


def file(folder: Path, **changes: object) -> Path:
    path = folder / "cost.json"
    fields = {"prefill_ms": [18, 0.1, 1e-5], "decode_ms": [20, 1e-3, 0.04], "kv_bytes_per_token": 9}
    path.write_text(json.dumps({**fields, **changes}))
    return path


def test_a_cost_model_file(tmp_path: Path) -> None:
    found = load_hardware(file(tmp_path, decode_large_ms=[7, 0, 0.2], large_batch=90))
    assert found.prefill == pytest.approx((0.018, 1e-4, 1e-8))
    assert found.iteration_s([], 90, 0) == pytest.approx(0.007 + 90 * 0.0002)
    assert found.iteration_s([], 89, 0) == pytest.approx(0.020 + 89 * 0.00004)
    assert found.kv_capacity_tokens is None


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("prefill_ms", [1, 2], "prefill_ms must be three numbers"),
        ("prefill_ms", "fast", "prefill_ms must be three numbers"),
        ("decode_ms", [0, 1, 1], "decode_ms must be three numbers"),
        ("decode_ms", [1, -1, 1], "decode_ms must be three numbers"),
        ("kv_bytes_per_token", 0, "kv_bytes_per_token must be a whole number"),
        ("large_batch", 1.5, "large_batch must be a whole number"),
    ],
)
def test_a_wrong_cost_model_is_one_sentence(
    tmp_path: Path, field: str, value: object, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        load_hardware(file(tmp_path, **{field: value}))


def test_a_cost_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_hardware(tmp_path / "none.json")


@pytest.mark.parametrize(("fair", "least", "most"), [(True, 0.99, 1.0), (False, 0.5, 0.9)])
def test_two_greedy_tenants_are_served_alike_only_if_service_is_shared(
    fair: bool, least: float, most: float
) -> None:
    """Both ask for more than half, one of them for three times as much as the other."""
    jobs = generate("sharegpt", 200, 1, Arrivals(), 4.0, tenants=2, tenant_skew=float(np.log2(3)))
    options = {"fair_sharing": fair}
    index = service_jain_index(run(jobs, "fixed-priority", max_num_seqs=4, scheduler=options))
    assert index is not None and least <= index <= most


def overload(workers: tuple[float, ...], jobs: int = 240) -> SimResult:
    """More than three workers could serve, of mixed lengths."""
    load = [SimJob(0.01 * n, 20 + 7 * n % 50, 40 + 31 * n % 120) for n in range(jobs)]
    return run(load, "fastserve", max_num_seqs=8, speeds=workers)


def test_two_workers_serve_nearly_twice_as_much() -> None:
    one, two = overload((1.0,)), overload((1.0, 1.0))
    assert one.makespan_s / two.makespan_s >= 1.9
    assert not np.isnan(two.end_s).any()


def test_a_slow_worker_gets_less() -> None:
    """As one and a half: had it the same share of the jobs, it would be as slow as one."""
    one, mixed = overload((1.0,)), overload((1.0, 0.5))
    assert one.makespan_s / mixed.makespan_s >= 1.35


def test_what_waits_moves_to_a_worker_that_idles() -> None:
    """All jobs look alike when they come; those of one worker happen to end sooner."""
    jobs = [SimJob(0.0, 10, 10 if n % 2 else 400) for n in range(64)]
    result = run(jobs, "fcfs", max_num_seqs=4, speeds=(1.0, 1.0))
    assert result.migrations > 0
    work = result.service_s.sum() / 4  # seconds of four rows
    assert result.makespan_s < 1.15 * work / 2


def test_several_workers_repeat_exactly() -> None:
    first, second = overload((1.0, 0.7, 1.0)), overload((1.0, 0.7, 1.0))
    assert list(first.end_s) == list(second.end_s)
    assert first.migrations == second.migrations


def test_in_a_full_device_jobs_stay_instead_of_taking_turns() -> None:
    """As many rows as jobs fit, copies that take longer than an iteration: what the order gains by
    turning with every quantum, the copies would cost."""
    hardware = Hardware(
        "cpu",
        (0.0085, 0.0006, 0.0),
        (0.0085, 1.2e-6, 0.00075),
        (0.0085, 0.0006, 0.0),
        99,
        None,
        23040,
    )
    jobs = generate("sharegpt", 150, 14, Arrivals(), 1.5)
    found = {}
    for strategy in KvStrategy:
        options = SimOptions(
            "fastserve", hardware, max_num_seqs=8, kv_tokens=3520, host_kv_tokens=40_000,
            kv_strategy=strategy, pcie_gbps=2, copy_ms=13,
        )  # fmt: skip
        found[strategy] = simulate(jobs, options)
    latency = {
        name: float(np.mean((result.end_s - result.arrival_s) / result.output_tokens))
        for name, result in found.items()
    }
    assert min(latency, key=lambda name: latency[name]) is KvStrategy.PROACTIVE
    proactive, reactive = found[KvStrategy.PROACTIVE], found[KvStrategy.REACTIVE]
    assert proactive.uploaded_tokens < 0.75 * reactive.uploaded_tokens
    assert proactive.kv_wait_s < 0.5 * reactive.kv_wait_s
