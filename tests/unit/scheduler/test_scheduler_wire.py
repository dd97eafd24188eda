"""Protocol encoding: worker plans and reports, gateway submissions and token batches."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.proto.v1 import sampling_pb2, scheduler_pb2, worker_pb2
from fastserve.scheduler import gateway_wire, wire
from fastserve.scheduler.clock import Clock
from fastserve.scheduler.core import (
    FinishReason,
    Job,
    JobSpec,
    KvOperation,
    KvOpKind,
    KvStatus,
    Plan,
    PlanRow,
    PrefixCache,
    ProtocolError,
    Rejection,
    RejectReason,
    SampledToken,
)
from fastserve.scheduler.jobs import End, JobRecord, TokenLogprobs


def record_of(job_id: str, output: list[int] | None = None) -> JobRecord:
    spec = JobSpec(job_id, prompt=(1, 2, 3), max_tokens=50, arrival=0.0)
    job = Job(spec, seq=0, now=0.0)
    job.output.extend(output or [])
    return JobRecord(
        spec=spec,
        output=job.output,
        job=job,
        sampling=sampling_pb2.SamplingParams(seed=9, max_tokens=50),
        traceparent="00-aa-bb-01",
        arrival_unix_s=0.0,
        deadline_unix_s=0.0,
    )


# Worker streams


class Stream:
    def __init__(self, prefix_cache: PrefixCache = PrefixCache.TENANT) -> None:
        self.records = {name: record_of(name, [7, 8]) for name in ("a", "b")}
        self.codec = wire.StreamCodec(42, self.records.get, prefix_cache)

    def row(self, job_id: str, tokens: int) -> PlanRow:
        job = self.records[job_id].job
        assert job is not None
        return PlanRow(job, tokens)


@pytest.fixture
def stream() -> Stream:
    return Stream()


def test_a_job_travels_whole_only_the_first_time(stream: Stream) -> None:
    first = stream.codec.encode(Plan(1, 4, [stream.row("a", 16)], [])).plan
    assert (first.scheduler_epoch, first.lease, first.reset) == (42, 4, False)
    (job,) = first.new_jobs
    assert list(job.token_ids) == [1, 2, 3, 7, 8]
    assert (job.prompt_len, job.sampling.seed, job.traceparent) == (3, 9, "00-aa-bb-01")
    second = stream.codec.encode(Plan(2, 4, [stream.row("b", 3), stream.row("a", 1)], [])).plan
    assert [new.job_id for new in second.new_jobs] == ["b"]
    assert list(second.row_handles) == [second.new_jobs[0].handle, job.handle]
    assert list(second.row_tokens) == [3, 1]
    assert wire.RESET_PLAN_ID < first.plan_id < second.plan_id


@pytest.mark.parametrize(
    ("prefix_cache", "salts"),
    [
        (PrefixCache.OFF, [b"", b""]),
        (PrefixCache.TENANT, [b"tenant:default", b"tenant:acme"]),
        (PrefixCache.ALL, [b"all", b"all"]),
    ],
)
def test_the_salt_says_who_shares(prefix_cache: PrefixCache, salts: list[bytes]) -> None:
    stream = Stream(prefix_cache)
    stream.records["b"].spec = dataclasses.replace(stream.records["b"].spec, tenant="acme")
    encoded = stream.codec.encode(Plan(1, 4, [stream.row("a", 9), stream.row("b", 9)], [])).plan
    assert [job.cache_salt for job in encoded.new_jobs] == salts


def test_no_tenant_can_be_named_so_that_it_shares_with_others() -> None:
    names = ["default", "", "all", "tenant:", "tenant:default"]
    specs = [JobSpec("a", (1,), 1, 0.0, tenant=name) for name in names]
    salts = {PrefixCache.TENANT.salt(spec) for spec in specs} | {PrefixCache.ALL.salt(specs[0])}
    assert len(salts) == len(names) + 1 and b"" not in salts


def test_a_job_nobody_knows_can_be_released(stream: Stream) -> None:
    plan = Plan(1, 0, [], [KvOperation(5, KvOpKind.RELEASE, "left-over")])
    encoded = stream.codec.encode(plan).plan
    assert [(new.job_id, len(new.token_ids)) for new in encoded.new_jobs] == [("left-over", 0)]
    assert list(encoded.op_handles) == [encoded.new_jobs[0].handle]


def test_a_handle_dies_with_its_release(stream: Stream) -> None:
    encoded = stream.codec.encode(Plan(1, 1, [stream.row("a", 1)], [])).plan
    handle = encoded.new_jobs[0].handle
    stream.codec.encode(Plan(2, 1, [], [KvOperation(5, KvOpKind.RELEASE, "a")]))
    report = worker_pb2.IterationReport(
        row_handles=[handle],
        row_new_tokens=[1],
        row_computed=[5],
        done_op_ids=[5],
        done_status=[worker_pb2.KV_STATUS_OK],
        done_tokens=[0],
        done_bytes=[0],
        done_seconds=[0.5],
    )
    decoded = stream.codec.decode(report)  # rows of the same report may still name it
    assert decoded.rows[0][0] == "a"
    assert decoded.ops == [(5, KvStatus.OK, 0, 0, 0.5)]
    with pytest.raises(ProtocolError, match="unknown handle"):
        stream.codec.decode(worker_pb2.IterationReport(stalled_handles=[handle]))
    again = stream.codec.encode(Plan(3, 1, [stream.row("a", 1)], [])).plan
    assert again.new_jobs[0].handle != handle


def test_a_report_is_decoded(stream: Stream) -> None:
    encoded = stream.codec.encode(Plan(6, 1, [stream.row("a", 9), stream.row("b", 1)], [])).plan
    a, b = encoded.row_handles
    decoded = stream.codec.decode(
        worker_pb2.IterationReport(
            plan_id=encoded.plan_id,
            iteration=3,
            row_handles=[a, b],
            row_new_tokens=[4, 1],
            row_computed=[4, 5],
            cached_handles=[b],
            cached_tokens=[4],
            sampled_handles=[b],
            sampled_indexes=[2],
            sampled_tokens=[77],
            finish_reasons=[sampling_pb2.FINISH_REASON_STOP],
            failed_handles=[a],
            failures=["broke"],
            free_device_blocks=8,
            free_host_blocks=9,
            seconds=0.25,
            context_tokens=11,
        )
    )
    assert decoded.plan_id == 6
    assert decoded.rows == [("a", 4, 4), ("b", 1, 5)]
    assert decoded.cached == [("b", 4)]
    assert decoded.sampled == [SampledToken("b", 2, 77, FinishReason.STOP)]
    assert decoded.failed == [("a", "broke")]
    assert (decoded.free_device_blocks, decoded.free_host_blocks) == (8, 9)
    assert (decoded.seconds, decoded.context_tokens, decoded.iteration) == (0.25, 11, 3)


def test_arrays_of_unequal_length_are_refused(stream: Stream) -> None:
    stream.codec.encode(Plan(1, 1, [stream.row("a", 1)], []))
    with pytest.raises(ProtocolError, match="unequal length"):
        stream.codec.decode(worker_pb2.IterationReport(row_handles=[1], row_new_tokens=[1]))
    inventory = worker_pb2.Inventory(job_ids=["a"])
    with pytest.raises(ProtocolError, match="unequal length"):
        wire.inventory_of(worker_pb2.IterationReport(inventory=inventory))


def test_a_worker_without_limits_is_refused() -> None:
    with pytest.raises(ProtocolError, match="block_size must be at least 1"):
        wire.worker_info(worker_pb2.DescribeResponse(worker_id="w"))


def test_logprobs_by_sampled_position() -> None:
    report = worker_pb2.IterationReport(
        has_logprobs=[0, 1, 0, 1],
        logprobs=[-1.0, -2.0],
        top_counts=[2, 0],
        top_ids=[5, 6],
        top_logprobs=[-1.0, -3.0],
    )
    assert wire.logprobs_of(report) == {1: (-1.0, [5, 6], [-1.0, -3.0]), 3: (-2.0, [], [])}


def test_phases() -> None:
    assert wire.phase_of([1, 1]) == "decode"
    assert wire.phase_of([5]) == "prefill"
    assert wire.phase_of([5, 1]) == "mixed"


# Gateway streams


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"job_id": ""}, "job_id"),
        ({"job_id": "a b"}, "job_id"),
        ({"job_id": "x" * 129}, "job_id"),
        ({"prompt_token_ids": []}, "prompt is empty"),
        ({"sampling": sampling_pb2.SamplingParams()}, "max_tokens"),
        ({"service_class": "vip"}, "interactive, default, batch"),
        ({"deadline_unix_s": float("nan")}, "deadline"),
        ({"deadline_unix_s": -1.0}, "deadline"),
        ({"tenant_weight": -1.0}, "tenant_weight"),
        ({"tenant_weight": float("nan")}, "tenant_weight"),
        ({"tenant_weight": float("inf")}, "tenant_weight"),
    ],
)
def test_senseless_submissions(changes: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {
        "job_id": "a",
        "prompt_token_ids": [1],
        "sampling": sampling_pb2.SamplingParams(max_tokens=1),
    }
    submit = scheduler_pb2.Submit(**{**fields, **changes})  # type: ignore[arg-type]
    result = gateway_wire.spec_of(submit, Clock())
    assert isinstance(result, Rejection)
    assert result.reason is RejectReason.INVALID
    assert message in result.message


def test_a_deadline_becomes_core_time() -> None:
    clock = Clock()
    submit = scheduler_pb2.Submit(
        job_id="a",
        prompt_token_ids=[1],
        sampling=sampling_pb2.SamplingParams(max_tokens=1),
        deadline_unix_s=clock.unix() + 5,
    )
    spec = gateway_wire.spec_of(submit, clock)
    assert isinstance(spec, JobSpec) and spec.deadline is not None
    assert spec.deadline - clock.now() == pytest.approx(5, abs=0.5)
    assert (spec.tenant, spec.service_class) == ("default", "default")
    assert (spec.tenant_weight, spec.min_tokens) == (1.0, 1)


def test_weight_and_certain_output_reach_the_core() -> None:
    submit = scheduler_pb2.Submit(
        job_id="a",
        tenant="acme",
        tenant_weight=2.5,
        prompt_token_ids=[1],
        sampling=sampling_pb2.SamplingParams(max_tokens=9, min_tokens=3),
    )
    spec = gateway_wire.spec_of(submit, Clock())
    assert isinstance(spec, JobSpec)
    assert (spec.tenant, spec.tenant_weight, spec.min_tokens) == ("acme", 2.5, 3)
    submit.min_output_tokens = 9
    spec = gateway_wire.spec_of(submit, Clock())
    assert isinstance(spec, JobSpec) and spec.min_tokens == 9


def test_every_reason_has_its_code() -> None:
    for reason in RejectReason:
        rejected = gateway_wire.rejected(3, Rejection(reason, "why", 2)).rejected
        assert scheduler_pb2.RejectReason.Name(rejected.reason) == f"REJECT_REASON_{reason.name}"
        assert (rejected.handle, rejected.message, rejected.retry_after_s) == (3, "why", 2)


def test_only_what_is_visible_leaves_and_only_once() -> None:
    record = record_of("a", [10, 11, 12])
    record.handle, record.visible = 4, 2
    packer = gateway_wire.TokenPacker()
    assert packer.add(record)
    batch = packer.message.tokens
    assert (list(batch.handles), list(batch.first_indexes), list(batch.tokens)) == (
        [4],
        [0],
        [10, 11],
    )
    assert list(batch.finish_reasons) == [0]
    assert list(batch.has_logprobs) == [0]
    again = gateway_wire.TokenPacker()
    assert again.add(record)
    assert again.empty


def test_the_end_comes_with_the_last_tokens() -> None:
    record = record_of("a", [10])
    record.visible = 1
    record.end, record.end_visible = End(FinishReason.FAILED, "broke"), True
    other = record_of("b", [5])
    other.visible = 1
    packer = gateway_wire.TokenPacker()
    assert packer.add(other)
    assert packer.add(record)
    batch = packer.message.tokens
    assert list(batch.finish_reasons) == [0, sampling_pb2.FINISH_REASON_FAILED]
    assert (list(batch.error_entries), list(batch.errors)) == ([1], ["broke"])


def test_cached_tokens_leave_with_the_first_token_and_with_it_alone() -> None:
    plain, cached = record_of("a", [10]), record_of("b", [20, 21])
    assert cached.job is not None
    cached.job.cached = 48
    plain.visible, cached.visible = 1, 0
    packer = gateway_wire.TokenPacker()
    assert packer.add(cached) and packer.empty  # accepted, no token yet
    cached.visible = 1
    assert packer.add(plain) and packer.add(cached)
    batch = packer.message.tokens
    assert (list(batch.cached_entries), list(batch.cached_tokens)) == ([1], [48])
    cached.visible = 2
    packer = gateway_wire.TokenPacker()
    assert packer.add(cached)
    assert not packer.message.tokens.cached_entries
    cached.sent = 0  # another gateway reads it from the start
    packer = gateway_wire.TokenPacker()
    assert packer.add(cached)
    assert list(packer.message.tokens.cached_tokens) == [48]


def test_tokens_a_gateway_has_seen_already_are_not_repeated() -> None:
    record = record_of("a", [10, 11])
    record.visible, record.sent = 2, 4  # seen under a leader that lost two of them
    packer = gateway_wire.TokenPacker()
    assert packer.add(record) and packer.empty
    assert isinstance(record.output, list)
    record.output.extend([12, 13, 14])
    record.visible = 5
    assert packer.add(record)
    batch = packer.message.tokens
    assert (list(batch.first_indexes), list(batch.tokens)) == ([4], [14])


def test_a_long_replay_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_wire, "_MAX_TOKENS", 4)
    record = record_of("a", list(range(10)))
    record.visible = 10
    record.end, record.end_visible = End(FinishReason.STOP, ""), True
    seen: list[int] = []
    complete = False
    while not complete:
        packer = gateway_wire.TokenPacker()
        complete = packer.add(record)
        assert not complete or packer.message.tokens.finish_reasons[0]
        assert len(packer.message.tokens.tokens) <= 4
        seen += packer.message.tokens.tokens
    assert seen == list(range(10))


@given(st.sets(st.integers(0, 7)), st.integers(0, 8), st.integers(1, 20))
def test_logprobs_of_some_tokens(have: set[int], visible: int, room: int) -> None:
    """After a change of leader tokens without log-probabilities come before those with."""
    record = record_of("a", list(range(8)))
    record.logprobs = {
        index: TokenLogprobs(
            -float(index), [index, index + 1][: index % 3], [0.0, 0.0][: index % 3]
        )
        for index in have
    }
    record.visible = visible
    tokens: list[int] = []
    logprobs: dict[int, float] = {}
    complete = False
    while not complete:
        with mock.patch.object(gateway_wire, "_MAX_TOKENS", room):
            packer = gateway_wire.TokenPacker()
        complete = packer.add(record)
        batch = packer.message.tokens
        assert len(batch.tokens) <= room
        assert len(batch.logprobs) == len(batch.top_counts)
        assert sum(batch.top_counts) == len(batch.top_ids) == len(batch.top_logprobs)
        if batch.has_logprobs and batch.has_logprobs[0]:
            logprobs.update(zip(batch.tokens, batch.logprobs, strict=True))
        tokens += batch.tokens
    assert tokens == list(range(visible))
    assert logprobs == {index: -float(index) for index in have if index < visible}
