"""`fastserve top`: asks the schedulers for snapshots and draws them, again and again."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import grpc
import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.live import Live

from fastserve.cli.errors import CliError
from fastserve.cli.schedulers import addresses, connect
from fastserve.cli.state import StateFolder
from fastserve.cli.top_view import Sample, Tier, View
from fastserve.common.tls import Tls
from fastserve.proto.v1 import scheduler_pb2, scheduler_pb2_grpc

_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Sources:
    """Whom to ask: gRPC addresses of schedulers, URLs of the sidecars' metrics."""

    schedulers: Sequence[str]
    sidecars: Sequence[str] = ()
    tls: Tls | None = None  # of the calls to schedulers


def local_sources(folder: StateFolder, tls: Tls | None = None) -> Sources:
    """Those of the `fastserve up` of this folder. Raises `CliError` if none runs."""
    schedulers = addresses([], folder)
    services = (folder.read() or {"services": {}})["services"]
    sidecars = (s["metrics"] for name, s in services.items() if name.startswith("kv-offload"))
    return Sources(schedulers, [url for url in sidecars if url], tls)


class Reader:
    """Takes samples. Standbys are passed over; who does not answer is named."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._channels = [connect(address, sources.tls) for address in sources.schedulers]
        self._http = httpx.Client(timeout=_TIMEOUT_S, trust_env=False)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._http.close()

    def sample(self) -> Sample:
        request = scheduler_pb2.SnapshotRequest(include_jobs=True)
        calls = [
            scheduler_pb2_grpc.SchedulerServiceStub(channel).Snapshot.future(
                request, timeout=_TIMEOUT_S
            )
            for channel in self._channels
        ]
        shards, missing = [], []
        for address, call in zip(self._sources.schedulers, calls, strict=True):
            try:
                shards.append(call.result())
            except grpc.RpcError as error:
                missing.append(f"{address}: {error.details()}")
        if shards:  # a standby says so; that is nothing to show while somebody leads
            missing = [line for line in missing if "standby" not in line]
        if not self._sources.schedulers:
            missing = ["no scheduler is up yet"]
        shards.sort(key=lambda shard: shard.shard)
        return Sample(time.monotonic(), shards, self._tiers(), missing)

    def _tiers(self) -> dict[str, Tier]:
        """Sums over the sidecars; one that does not answer is left out."""
        tiers: dict[str, Tier] = {}
        for url in self._sources.sidecars:
            with contextlib.suppress(httpx.HTTPError):
                for name, more in tiers_of(self._http.get(url).text).items():
                    had = tiers.get(name, Tier())
                    tiers[name] = Tier(
                        had.used + more.used,
                        had.slots + more.slots,
                        had.bytes_out + more.bytes_out,
                        had.bytes_in + more.bytes_in,
                    )
        return {name: tier for name, tier in tiers.items() if tier != Tier()}


def tiers_of(metrics: str) -> dict[str, Tier]:
    """Tiers by name from the metrics of a sidecar in Prometheus' text format."""
    tiers: dict[str, Tier] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            value = sample.value
            for name in ("host", "disk"):
                if sample.name == f"fastserve_{name}_kv_slots":
                    tier = tiers.get(name, Tier())
                    used = 0 if sample.labels["state"] == "free" else int(value)
                    tiers[name] = replace(
                        tier, used=tier.used + used, slots=tier.slots + int(value)
                    )
            if sample.name == "fastserve_kv_tier_bytes_total":
                name = sample.labels["tier"]
                tier = tiers.get(name, Tier())
                if sample.labels["direction"] == "out":
                    tiers[name] = replace(tier, bytes_out=value)
                else:
                    tiers[name] = replace(tier, bytes_in=value)
    return tiers


def run(sources: Sources, console: Console, *, once: bool, interval_s: float) -> None:
    """Draw until q or Ctrl-C; once if asked, or if this is no terminal.

    Raises `CliError` if no scheduler answers the first time.
    """
    with contextlib.closing(Reader(sources)) as reader:
        view = View()
        first = reader.sample()
        if not first.shards:
            raise CliError("\n".join(first.missing))
        view.update(first)
        if once or not console.is_terminal:
            console.print(view.render(), highlight=False)
            return
        with (
            _keys() as pressed,
            Live(view.render(), console=console, screen=True, auto_refresh=False) as live,
        ):
            while "q" not in pressed(interval_s):
                view.update(reader.sample())
                live.update(view.render(), refresh=True)


@contextlib.contextmanager
def _keys() -> Iterator[_Pressed]:
    """A function that waits for keys; without a terminal for input it only waits."""
    if not sys.stdin.isatty():
        yield _Pressed(None)
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield _Pressed(terminal)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


class _Pressed:
    def __init__(self, terminal: int | None) -> None:
        self._terminal = terminal

    def __call__(self, wait_s: float) -> str:
        """What was typed within the time; waits for all of it if nothing was."""
        if self._terminal is None:
            time.sleep(wait_s)
            return ""
        ready, _, _ = select.select([self._terminal], [], [], wait_s)
        return os.read(self._terminal, 64).decode(errors="replace") if ready else ""
