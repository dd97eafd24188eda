"""What hurts users of LLM servers today, one test per public thread, named beside it.

Through the core's public interface or the simulator around it; times are simulated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fastserve.bench.sim.engine import simulate
from fastserve.bench.sim.hardware import OPT_13B
from fastserve.bench.sim.types import SimJob, SimOptions, SimResult
from fastserve.scheduler.core import JobState, KvOpKind, KvState, RejectReason
from fastserve.scheduler.core.policies import POLICIES
from support.scheduler_rig import Rig
from support.worker_model import token_of

PREEMPTIVE = ["fastserve", "skip-join-mlfq"]


def _run(policy: str, jobs: Sequence[SimJob], **options: object) -> SimResult:
    return simulate(jobs, SimOptions(policy, OPT_13B, **options))  # type: ignore[arg-type]


def _ttft(result: SimResult) -> np.ndarray:
    return result.first_token_s - result.arrival_s


def _e2e(result: SimResult) -> np.ndarray:
    return result.end_s - result.arrival_s


def _stream(long_every: int, short_s: float, count: int) -> list[SimJob]:
    """Short questions at a steady pace, among them long ones."""
    return [
        SimJob(n * short_s, 1000 if n % long_every == 0 else 30, 400 if n % long_every == 0 else 20)
        for n in range(count)
    ]


@pytest.mark.parametrize("policy", PREEMPTIVE)
def test_a_long_prompt_does_not_hide_short_ones(policy: str) -> None:  # vllm #10774
    jobs = [SimJob(0.0, 30_000, 5), *(SimJob(0.1 + n / 10, 40, 5) for n in range(20))]
    result = _run(policy, jobs, max_num_batched_tokens=512)
    first = _ttft(result)
    whole = _ttft(_run("fcfs", jobs, max_num_batched_tokens=30_001))
    alone = _ttft(_run(policy, jobs[:1], max_num_batched_tokens=512))[0]
    assert whole[1:].max() > 5.0, "the prompt is not long enough to hide anything"
    chunk_s = alone / (30_000 / 512)
    assert first[1:].max() < 3 * chunk_s, "the rest of one chunk, and its own iteration beside one"
    short_s = 20 * 45 / 512 * chunk_s  # the tokens of all short ones
    assert first[0] < 1.5 * (alone + short_s), "and it gets on meanwhile"


@pytest.mark.parametrize("limit", [1, 2])
def test_long_prefills_at_a_time_are_limited(limit: int) -> None:  # vllm #57413
    rig = Rig(
        {"policy": "fixed-priority", "max_partial_prefills": limit},
        max_num_batched_tokens=16,
        device_blocks=64,
    )
    rig.submit("answering", prompt=44, max_tokens=20)  # the last in the order
    rig.run(4)
    for name in "abcd":
        rig.submit(name, prompt=40, max_tokens=2)
    answered = 0
    for _ in range(8):
        plan = rig.plan()
        if plan is not None:
            partial = [job.job_id for job, tokens in plan.rows if tokens < job.remaining]
            assert len(partial) <= limit
        progress = rig.step()
        assert progress is not None
        answered += "answering" in {job_id for job_id, _, _, _ in progress.tokens}
    assert answered == 8, "decodes go on beside the prefills"


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_who_fits_passes_who_does_not(policy: str) -> None:  # vllm #31731
    rig = Rig({"policy": policy}, device_blocks=16)
    rig.submit("running", prompt=30, max_tokens=30, priority=-1)
    rig.run(2)
    rig.submit("hungry", prompt=40, max_tokens=8, priority=0 if policy == "srpt" else -1)
    rig.submit("small", prompt=4, max_tokens=1)
    assert "small" in rig.run(8)
    assert rig.run(200)[-1:] in (["running"], ["hungry"])
    assert not list(rig.scheduler.jobs())


def test_what_can_never_fit_is_refused_at_once() -> None:  # vllm #39734
    rig = Rig(device_blocks=8, max_model_len=64)
    rejection = rig.submit("large", prompt=40, max_tokens=8)  # 12 blocks
    assert rejection is not None and rejection.reason is RejectReason.TOO_LONG
    rig.submit("next")
    assert rig.run(20) == ["next"]


@pytest.mark.parametrize("policy", ["srpt", "fastserve", "skip-join-mlfq", "fixed-priority"])
def test_short_jobs_first_makes_the_mean_shorter(policy: str) -> None:  # vllm #29406
    """Shorter than with turns for everybody (a single level), which beats first come already."""
    jobs = _stream(long_every=5, short_s=0.4, count=60)
    fcfs, turns, ours = (
        _e2e(_run(name, jobs, max_num_seqs=2, scheduler=scheduler)).mean()
        for name, scheduler in (("fcfs", {}), ("mlfq", {"levels": 1}), (policy, {}))
    )
    assert ours < turns < fcfs


def test_skip_join_mlfq_of_the_paper() -> None:  # vllm PR #25567, #3342
    """Short answers overtake, long prompts do not block the first queue, all end."""

    def run(policy: str, jobs: Sequence[SimJob]) -> SimResult:
        scheduler = {"starvation_s": 1e6}
        return _run(policy, jobs, max_num_seqs=2, max_num_batched_tokens=512, scheduler=scheduler)

    # Prompts do not tell which answers are long: only demotion does.
    alike = [SimJob(n * 0.4, 30, 400 if n % 5 == 0 else 20) for n in range(60)]
    by_prompt, by_level = (run(name, alike) for name in ("fixed-priority", "skip-join-mlfq"))
    tokens = by_level.output_tokens
    assert (_e2e(by_level) / tokens).mean() < 0.3 * (_e2e(by_prompt) / tokens).mean()
    # Three long prompts and, right behind them, two short ones: the naive queue takes a chunk of
    # each long one first.
    bursts = [
        SimJob(n * 8.0 + 0.001 * place, prompt, 20)
        for n in range(20)
        for place, prompt in enumerate((1000, 1000, 1000, 30, 30))
    ]
    skip_join, naive = (run(name, bursts) for name in ("skip-join-mlfq", "mlfq"))
    short = skip_join.prompt_tokens < 100
    assert _ttft(skip_join)[short].max() < 0.5 * _ttft(naive)[short].max()
    assert not np.isnan(skip_join.end_s).any()


def test_the_highest_response_ratio_spares_the_tail() -> None:  # sglang PR #32911
    """Slightly more short ones than two rows can take, and one long prompt: with the shortest first
    it waits for the whole stream, here for about as many short ones as its prefill is worth (a
    fifth of the stream at the very most)."""
    jobs = [SimJob(0.0, 30, 20), SimJob(0.0, 30, 20), SimJob(0.01, 800, 20)]
    jobs += [SimJob(0.02 + n * 0.2, 30, 20) for n in range(120)]
    options = {"max_num_seqs": 2, "scheduler": {"starvation_s": 1e6}}
    hrrn, shortest, fcfs = (
        _ttft(_run(name, jobs, **options)) for name in ("hrrn", "fixed-priority", "fcfs")
    )
    assert hrrn[3:10].mean() < fcfs[3:10].mean(), "short ones pass the long one at first"
    assert hrrn.max() < 0.2 * shortest.max()


@pytest.mark.parametrize("policy", ["fixed-priority", "skip-join-mlfq"])
def test_aging_bounds_the_wait_of_those_behind(policy: str) -> None:  # sglang #31954
    jobs = [SimJob(0.0, 800, 20), *(SimJob(n * 0.05, 30, 20) for n in range(200))]

    def worst(starvation_s: float) -> float:
        scheduler = {"starvation_s": starvation_s}
        return float(_e2e(_run(policy, jobs, max_num_seqs=2, scheduler=scheduler))[0])

    # Without it the long job waits for the whole stream; with it, only a part of that.
    assert worst(1e6) > jobs[-1].arrival_s > worst(1.0)


def test_short_ones_first_with_aging() -> None:  # TensorRT-LLM PR #12428
    """A better median than first come first served, without a tail that has no end: past capacity a
    long job ends while short ones keep coming, not only when they are through."""
    jobs = _stream(long_every=5, short_s=0.4, count=100)
    aging, fcfs = (_e2e(_run(name, jobs, max_num_seqs=2)) for name in ("fastserve", "fcfs"))
    assert np.median(aging) < 0.5 * np.median(fcfs)
    stream = [SimJob(0.0, 800, 100), *(SimJob(0.02 + n * 0.2, 30, 20) for n in range(900))]
    aging, walls = (
        _run(name, stream, max_num_seqs=2, scheduler={"starvation_s": 1e6}).end_s[0]
        for name in ("fastserve", "skip-join-mlfq")
    )
    assert aging < stream[-1].arrival_s < walls


def test_a_preempted_job_goes_on_from_host_memory() -> None:  # llama.cpp #22916
    """A flag for priority, KV kept in RAM, and no preemption for the sake of an equal."""
    rig = Rig({"policy": "fixed-priority"}, device_blocks=16)
    rig.submit("batch", prompt=36, max_tokens=20)
    rig.run(6)
    batch = rig.job("batch")
    rig.submit("urgent", prompt=30, max_tokens=2, priority=-1)
    assert rig.run(40) == ["urgent", "batch"]
    assert batch.output == [token_of("batch", index) for index in range(20)]
    assert rig.scheduler.counters["tokens.recomputed"] == 0
    assert rig.ops.count((KvOpKind.OFFLOAD, "batch")) == 1
    assert batch.preemptions == 1
    rig.submit("a", prompt=20, max_tokens=20)
    rig.run(3)
    rig.submit("b", prompt=20, max_tokens=20)
    assert rig.run(60) == ["a", "b"]
    assert rig.scheduler.counters["preemptions.priority.swap"] == 0


@pytest.mark.parametrize("policy", [*PREEMPTIVE, "srpt"])
def test_nothing_is_lost_where_nothing_is_scarce(
    policy: str,
) -> None:  # LLM-serving-with-proxy-models #12
    jobs = _stream(long_every=5, short_s=0.2, count=60)
    ours, fcfs = (_e2e(_run(name, jobs, max_num_seqs=256)) for name in (policy, "fcfs"))
    assert ours.mean() == pytest.approx(fcfs.mean(), rel=0.03)
    assert ours.max() == pytest.approx(fcfs.max(), rel=0.03)


class TestPriority:  # vllm #40004
    @pytest.mark.parametrize("policy", [*PREEMPTIVE, "mlfq", "fixed-priority"])
    def test_an_urgent_job_displaces_exactly_one(self, policy: str) -> None:
        """Although its prompt is the longest."""
        rig = Rig({"policy": policy, "quantum_s": 10.0}, max_num_seqs=2, device_blocks=64)
        rig.submit("a", max_tokens=30)
        rig.submit("b", max_tokens=30)
        rig.run(2)
        rig.submit("urgent", prompt=16, priority=-1)
        assert rig.rows()[0][0] == "urgent"
        states = sorted(rig.job(name).state for name in "ab")
        assert states == [JobState.PREEMPTED, JobState.RUNNING]

    def test_an_equal_one_waits(self) -> None:
        rig = Rig({"policy": "fixed-priority"}, max_num_seqs=1)
        rig.submit("a", prompt=4, max_tokens=30)
        rig.run(1)
        rig.submit("b", prompt=4)
        rig.run(3)
        assert rig.job("b").state is JobState.QUEUED
        assert rig.job("a").preemptions == 0

    def test_nobody_stops_for_one_that_cannot_start(self) -> None:
        """The blocks it needs are with jobs that come before it."""
        rig = Rig({"policy": "fixed-priority"}, device_blocks=16)
        rig.submit("first", prompt=30, max_tokens=20, priority=-2)
        rig.submit("worse", prompt=8, max_tokens=20)
        rig.run(2)
        rig.submit("waiting", prompt=40, max_tokens=8, priority=-1)
        rig.run(4)
        assert rig.job("waiting").state is JobState.QUEUED
        assert rig.job("worse").state is JobState.RUNNING
        assert rig.job("worse").preemptions == 0
        assert {kind for kind, _ in rig.ops} <= {KvOpKind.COPY_OUT}  # beside rows


def test_who_was_preempted_comes_back_before_later_ones() -> None:  # vllm #41951
    rig = Rig({"policy": "fixed-priority"}, max_num_seqs=1, device_blocks=64)
    rig.submit("old", prompt=8, max_tokens=10)
    rig.submit("second", prompt=8, max_tokens=2)
    rig.run(3)
    rig.submit("urgent", prompt=4, max_tokens=2, priority=-1)
    rig.run(1)
    assert rig.job("old").state is JobState.PREEMPTED
    rig.submit("later", prompt=8, max_tokens=2)
    assert rig.run(30) == ["urgent", "old", "second", "later"]
    assert rig.scheduler.counters["tokens.recomputed"] == 0


@pytest.mark.parametrize("host_blocks", [0, 64])
def test_priority_may_stop_a_prefill_under_way(host_blocks: int) -> None:  # vllm #9342, #10101
    rig = Rig(device_blocks=16, host_blocks=host_blocks, max_num_batched_tokens=8)
    rig.submit("prompt", prompt=44, max_tokens=3)
    rig.run(3)
    prompt = rig.job("prompt")
    assert 0 < prompt.computed < 44, "in the middle of its prefill"
    rig.submit("urgent", prompt=40, max_tokens=2, priority=-1)
    rig.run(1)
    assert prompt.state is JobState.PREEMPTED
    assert rig.run(60) == ["urgent", "prompt"]
    assert prompt.output == [token_of("prompt", index) for index in range(3)]


def test_no_more_are_stopped_than_needed() -> None:  # sglang #12493
    rig = Rig({"policy": "fixed-priority"}, max_num_seqs=8, device_blocks=24, max_model_len=96)
    for name in "abcd":  # of 6 blocks each
        rig.submit(name, prompt=12, max_tokens=12)
    rig.run(8)
    rig.submit("urgent", prompt=16, max_tokens=4, priority=-1)
    rig.run(2)
    assert rig.job("urgent").state is JobState.RUNNING
    stopped = [name for name in "abcd" if rig.job(name).state is JobState.PREEMPTED]
    assert stopped == ["d"], "the last one's blocks are enough"


def test_long_prompts_do_not_take_turns_in_recomputing() -> None:  # vllm PR #37307
    """Many long prompts, memory for two of them, none on the host. A job loses what it computed
    twice for younger ones, and now and then for an older one; without that limit the work is done
    311 times over here by skip-join MLFQ, and 2.9 times by FastServe."""
    jobs = [SimJob(0.01 * n, 3000, 200) for n in range(12)]
    total = sum(job.prompt_tokens + job.output_tokens for job in jobs)
    for policy in (*PREEMPTIVE, "fcfs"):
        result = _run(policy, jobs, kv_tokens=7000, host_kv_tokens=0)
        assert result.recomputed_tokens < 2.5 * total, policy
        assert not np.isnan(result.end_s).any()


def test_a_row_is_planned_only_for_what_lies_on_the_device() -> None:  # vllm PR #29870, #46014
    """A block that a copy still reads is nobody else's."""
    rig = Rig({"policy": "fixed-priority"}, device_blocks=16)
    rig.submit("old", prompt=36, max_tokens=20)
    rig.run(4)
    rig.slow_copies = True
    rig.submit("urgent", prompt=30, max_tokens=2, priority=-1)
    rig.run(3)
    assert rig.job("old").kv is KvState.OFFLOADING
    assert rig.job("urgent").state is JobState.QUEUED
    rig.slow_copies = False
    assert rig.run(40) == ["urgent", "old"]
