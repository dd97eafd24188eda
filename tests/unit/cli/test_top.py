"""What `fastserve top` shows."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import subprocess
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console
from typer.testing import CliRunner

from fastserve.cli.errors import CliError
from fastserve.cli.main import app
from fastserve.cli.state import StateFolder
from fastserve.cli.top import local_sources, tiers_of
from fastserve.cli.top_view import Move, Sample, Tier, View
from fastserve.kv_offload.metrics import Metrics
from fastserve.proto.v1 import scheduler_pb2 as pb
from fastserve.proto.v1 import scheduler_pb2_grpc
from support.deployment import command


def job(name: str, state: str = "queued", level: int = 0, **fields: Any) -> pb.JobState:
    return pb.JobState(job_id=name, tenant="acme", state=state, level=level, kv="none", **fields)


def snapshot(*jobs: pb.JobState, **fields: Any) -> pb.SnapshotResponse:
    depths = [0, 0, 0]
    for one in jobs:
        depths[one.level] += one.state != "running"
    reply = pb.SnapshotResponse(
        policy="fastserve",
        durable=True,
        level_depths=depths,
        level_quanta_s=[0.02, 0.04, 1.5],
        shard="blue",
        jobs=jobs,
    )
    reply.MergeFrom(pb.SnapshotResponse(**fields))
    return reply


def worker(**fields: Any) -> pb.WorkerState:
    return pb.WorkerState(address="w:1", worker_id="w0", connected=True, **fields)


def shown(view: View) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(view.render())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line(text: str, start: str) -> list[str]:
    """Words of the first line that begins so."""
    return next(line.split() for line in text.splitlines() if line.startswith(start))


def test_one_sample() -> None:
    view = View()
    jobs = [job("a", "running"), job("b", level=2), job("c", "preempted", 2)]
    state = worker(
        running=1,
        device_blocks=10,
        free_device_blocks=4,
        host_blocks=8,
        free_host_blocks=8,
    )
    counters = {"preemptions.quantum.swap": 3, "preemptions.memory.swap": 1, "promotions": 7}
    view.update(Sample(5.0, [snapshot(*jobs, workers=[state], counters=counters)]))
    text = shown(view)
    assert "shard blue" in text and "fastserve" in text and "durable" not in text
    assert "1 running, 2 waiting (1 preempted)  4 preemptions" in text
    levels = [words for words in map(str.split, text.splitlines()) if words[:1] in (["0"], ["2"])]
    assert levels[0] == ["0", "20.0", "ms", "1"]  # runs one, nobody waits
    assert levels[1][:4] == ["2", "1.5", "s", "2"]
    assert line(text, "device w0")[2:4] == ["6", "10"]
    assert line(text, "host w0")[2:4] == ["0", "8"]
    assert line(text, "w0")[1] == "1"  # rows
    assert "MB/s" not in text  # no rate without a sample before


def test_rates_between_two_samples() -> None:
    view = View()
    for at, iterations, tokens, bytes_out in ((10.0, 100, 500, 1e6), (12.0, 150, 800, 21e6)):
        state = worker(
            iterations=iterations,
            sampled_tokens=tokens,
            processed_tokens=2 * tokens,
            iteration_s=0.0125,
            cost_model_error=0.07,
        )
        tiers = {"host": Tier(used=3, slots=4, bytes_out=bytes_out, bytes_in=5.0)}
        view.update(Sample(at, [snapshot(workers=[state])], tiers))
    text = shown(view)
    assert line(text, "w0") == ["w0", "0", "12.5", "ms", "150.0", "300.0", "7%"]
    assert line(text, "host")[:3] == ["host", "3", "4"]
    assert line(text, "host")[-4:] == ["10.0", "MB/s", "0.0", "MB/s"]
    assert "host w0" not in text  # the sidecar knows its slots better


def test_a_worker_that_restarted_has_no_rate() -> None:
    view = View()
    for at, iterations in ((1.0, 100), (2.0, 3)):
        view.update(Sample(at, [snapshot(workers=[worker(iterations=iterations)])]))
    assert "-97" not in shown(view)


def test_jobs_that_move_between_levels() -> None:
    view = View()
    view.update(Sample(1.0, [snapshot(job("a"), job("b"), job("c", level=2))]))
    assert not view.moves, "what was never seen before did not move"
    view.update(Sample(2.0, [snapshot(job("a", level=2), job("b", level=2), job("c", level=0))]))
    assert set(view.moves) == {Move(2.0, "a", 0, 2), Move(2.0, "b", 0, 2), Move(2.0, "c", 2, 0)}
    text = shown(view)
    assert "a level 0 → 2, 0 s ago" in text
    moved = [words[-2:] for words in map(str.split, text.splitlines()) if words[:1] == ["2"]]
    assert moved[0] == ["+2", "-1"]
    view.update(Sample(3.0, [snapshot(job("a", level=2))]))
    assert "+2" not in shown(view) and "1 s ago" in shown(view)
    view.update(Sample(60.0, [snapshot(job("a", level=2))]))
    assert not view.moves


def test_troubles_are_shown() -> None:
    view = View()
    lost = pb.WorkerState(address="w:9")
    view.update(Sample(1.0, [snapshot(workers=[lost])], missing=["s:7070: refused"]))
    view._now.shards[0].durable = False  # type: ignore[union-attr]
    text = shown(view)
    assert "s:7070: refused" in text
    assert "w:9" in text and "not connected" in text
    assert "NOT durable" in text


def test_many_jobs_do_not_fill_the_screen() -> None:
    view = View(most_jobs=2)
    jobs = [job(f"j{at}", level=at % 3, age_s=at) for at in range(9)]
    view.update(Sample(1.0, [snapshot(*jobs, job("r", "running", level=2))]))
    text = shown(view)
    assert "and 8 more" in text
    assert line(text, "r ")[2] == "running"  # who runs comes first
    assert "j6" in text, "then the oldest of the highest level"


def test_tiers_are_those_of_the_sidecar() -> None:
    metrics = Metrics()
    metrics.moved("host", "out", 4096, 0.1)
    metrics.moved("disk", "in", 8192, 0.1)
    slots = [("host", "free", 5), ("host", "reserved", 1), ("host", "committed", 2)]
    text = generate_latest(metrics.registry).decode() + "".join(
        f'fastserve_{tier}_kv_slots{{state="{state}"}} {count}\n' for tier, state, count in slots
    )
    assert tiers_of(text) == {
        "host": Tier(used=3, slots=8, bytes_out=4096),
        "disk": Tier(bytes_in=8192),
    }
    assert tiers_of(generate_latest(CollectorRegistry()).decode()) == {}


def test_it_fits_into_eighty_columns() -> None:
    view = View()
    for at in (1.0, 2.0):
        state = pb.WorkerState(
            address="w:1",
            worker_id="worker-0",
            connected=True,
            model="SmolLM2-135M-Instruct",
            iterations=9,
            iteration_s=0.0301,
            sampled_tokens=round(12345 * at),
            processed_tokens=round(123456 * at),
            device_blocks=1024,
        )
        tiers = {"host": Tier(used=1000, slots=2912, bytes_out=4e9 * at, bytes_in=4e9 * at)}
        long = job("cmpl-0123456789abcdef0123456789abcdef-0", "preempted", prompt_tokens=12345)
        view.update(Sample(at, [snapshot(long, workers=[state])], tiers))
    console = Console(file=io.StringIO(), width=80)
    console.print(view.render())
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    whole = ["SmolLM2-135M-Instruct", "12345.0", "123456.0", "4000.0 MB/s", "preempted", "bcdef-0"]
    assert all(word in text for word in whole), text
    assert text.count("…") == 1, "only the id is cut"


def test_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="does not run here"):
        local_sources(StateFolder(tmp_path))


class _Servicer(scheduler_pb2_grpc.SchedulerServiceServicer):
    def Serve(self, request_iterator: Any, context: Any) -> Any:
        raise NotImplementedError

    def Drain(self, request: Any, context: Any) -> Any:
        raise NotImplementedError


class _Standby(_Servicer):
    def Snapshot(self, request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNAVAILABLE, "standby: another scheduler leads")


class _Leader(_Servicer):
    def Snapshot(self, request: pb.SnapshotRequest, context: Any) -> pb.SnapshotResponse:
        assert request.include_jobs
        return snapshot(job("a", "running"))


def test_schedulers_by_address(tmp_path: Path) -> None:
    """The leader is shown, the standby is passed over, and alone it is an error."""
    servers = []
    for name, servicer in (("leader", _Leader()), ("standby", _Standby())):
        server = grpc.server(futures.ThreadPoolExecutor(1))
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(servicer, server)
        server.add_insecure_port(f"unix:{tmp_path}/{name}.sock")
        server.start()
        servers.append(server)
    try:
        leader, standby = (f"--scheduler=unix:{tmp_path}/{n}.sock" for n in ("leader", "standby"))
        both = CliRunner().invoke(app, ["top", standby, leader])
        assert both.exit_code == 0 and "shard blue" in both.output, both.output
        assert "standby" not in both.output
        alone = CliRunner().invoke(app, ["top", standby, "--once"])
        assert isinstance(alone.exception, CliError) and "standby" in str(alone.exception)
    finally:
        for server in servers:
            server.stop(0).wait(5)


def test_on_a_terminal_until_q(tmp_path: Path) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(_Leader(), server)
    server.add_insecure_port(f"unix:{tmp_path}/s.sock")
    server.start()
    here, there = pty.openpty()
    try:
        process = subprocess.Popen(
            command("top", f"--scheduler=unix:{tmp_path}/s.sock", "--interval=0.1"),
            stdin=there,
            stdout=there,
            stderr=there,
        )
        os.close(there)
        seen = b""
        while seen.count(b"shard blue") < 3 and select.select([here], [], [], 30)[0]:
            seen += os.read(here, 65536)
        assert seen.count(b"shard blue") >= 3, "it is drawn again and again"
        os.write(here, b"q")
        while process.poll() is None and select.select([here], [], [], 30)[0]:
            with contextlib.suppress(OSError):  # the terminal is closed on the other side
                os.read(here, 65536)
        assert process.wait(timeout=30) == 0
    finally:
        os.close(here)
        server.stop(0).wait(5)
