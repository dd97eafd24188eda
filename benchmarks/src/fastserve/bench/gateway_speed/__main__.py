"""`python -m fastserve.bench.gateway_speed`: streams through one gateway, and its CPU time.

Three processes: this client, the gateway, and a stub in the place of the scheduler, which gives
every stream one token per iteration. The CPU time of the gateway says how much one core carries
however busy the machine is; what came through per second also depends on the other two processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import uvloop
from rich import box
from rich.table import Table

from fastserve.bench.load.command import raise_file_limit
from fastserve.bench.load.http import Address, Body, HttpClient
from fastserve.bench.load.report import Slo, report
from fastserve.bench.load.run import Runner
from fastserve.bench.load.target import CHAT, Asking, Target
from fastserve.bench.load.types import LoadRequest
from fastserve.bench.output import display
from fastserve.bench.processes import (
    ServerProcess,
    StartError,
    end_on_sigterm,
    model_folder,
    server,
)

_START_S: Final = 60.0
_TIMEOUT_S: Final = 120.0  # of a request
_PROMPT: Final = "Tell me a story about a gateway that never drops a token."


@dataclass(frozen=True, slots=True)
class Case:
    """So many streams at once, of so many tokens, `offered` tokens per second in all."""

    name: str
    streams: int
    tokens: int
    offered: float
    waves: int = 1

    @property
    def iteration_s(self) -> float:
        return self.streams / self.offered


async def run_case(case: Case, model: Path, folder: Path, profile: Path | None) -> dict[str, Any]:
    """Raises `StartError`."""
    socket = f"unix:{folder}/stub.sock"
    stub_ready, gateway_ready = folder / "stub.ready", folder / "gateway.ready"
    for path in (stub_ready, gateway_ready):
        path.unlink(missing_ok=True)
    stub_argv = [sys.executable, "-m", "fastserve.bench.gateway_speed.stub", "--listen", socket]
    stub_argv += ["--iteration", str(case.iteration_s), "--ready-file", str(stub_ready)]
    gateway_argv = [sys.executable, "-m", "fastserve.gateway", "--port=0", f"--scheduler={socket}"]
    gateway_argv += [f"--model={model}", f"--ready-file={gateway_ready}", "--log-level=warning"]
    async with (
        server("the stub", stub_argv, folder / "stub.log") as stub,
        server("the gateway", gateway_argv, folder / "gateway.log") as gateway,
    ):
        await stub.ready(stub_ready.exists, _START_S)
        await gateway.ready(gateway_ready.exists, _START_S)
        port = json.loads(gateway_ready.read_text())["port"]
        http = HttpClient(Address(f"http://127.0.0.1:{port}"), {})
        try:
            await gateway.ready(lambda: _serves(http), _START_S)
            target = await Target.find(
                http, None, Asking(CHAT, ignore_eos=True, timeout_s=_TIMEOUT_S)
            )
            return await _measure(case, target, gateway, profile)
        finally:
            http.close()


async def _serves(http: HttpClient) -> bool:
    body = Body()
    await http.request("GET", "/readyz", b"", body)
    return body.status == 200


async def _measure(
    case: Case, target: Target, gateway: ServerProcess, profile: Path | None
) -> dict[str, Any]:
    requests = [LoadRequest(0.0, _PROMPT, None, case.tokens)] * (case.streams * case.waves)
    await Runner(target, asyncio.Event()).closed_loop(requests[:8], 4)  # warm
    process = psutil.Process(gateway.pid)
    profiler = None
    if profile is not None:
        profiler = await asyncio.create_subprocess_exec(
            "py-spy", "record", "--pid", str(gateway.pid), "--output", str(profile),
            "--format", "raw", "--rate", "200", "--duration", "600",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
    before = process.cpu_times()
    result = await Runner(target, asyncio.Event()).closed_loop(requests, case.streams)
    after = process.cpu_times()
    if profiler is not None:
        profiler.send_signal(2)
        await profiler.wait()
    cpu_s = after.user + after.system - before.user - before.system
    events = sum(outcome.events for outcome in result.outcomes)
    found = report(result, Slo(), ignore_eos=True, cut_to_length=0)
    tokens = found["output_tokens"]
    return {
        "case": case.name,
        "streams": case.streams,
        "tokens_per_stream": case.tokens,
        "offered_tokens_per_s": case.offered,
        "tokens_per_s": found["output_tokens_per_s"],
        "failed": found["failed"],
        "errors": found["errors"],
        "gateway_cpu_s": cpu_s,
        "tokens_per_cpu_s": tokens / cpu_s if cpu_s else 0.0,
        "us_per_event": cpu_s / events * 1e6 if events else 0.0,
        "tokens_per_event": tokens / events if events else 0.0,
        "gateway_memory_mb": process.memory_info().rss / 1e6,
        "ttft_s": found["ttft_s"],
        "itl_s": found["itl_s"],
        "client": found["client"],
    }


def _table(found: Sequence[dict[str, Any]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for words in (
        *("case", "streams", "offered", "through", "failed", "CPU s"),
        *("tokens/CPU s", "tokens/event", "µs/event", "TTFT P99", "ITL P50", "P99"),
        *("client CPU", "MB"),
    ):
        shown.add_column(words, justify="left" if words == "case" else "right")
    for row in found:
        shown.add_row(
            row["case"],
            f"{row['streams']:,}",
            f"{row['offered_tokens_per_s']:,.0f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['failed']:,}",
            f"{row['gateway_cpu_s']:.2f}",
            f"{row['tokens_per_cpu_s']:,.0f}",
            f"{row['tokens_per_event']:.2f}",
            f"{row['us_per_event']:.0f}",
            *(
                "-" if value is None else f"{value:.3f}"
                for value in (row["ttft_s"]["p99"], row["itl_s"]["p50"], row["itl_s"]["p99"])
            ),
            f"{row['client']['cpu']:.0%}",
            f"{row['gateway_memory_mb']:.0f}",
        )
    return shown


async def _run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    cases = [
        Case("steady", arguments.streams, 128, arguments.rate, arguments.waves),
        Case("many short", arguments.short_streams, 16, arguments.rate),
    ]
    wanted = [case for case in cases if arguments.case in (None, case.name.split()[0])]
    model = arguments.model or model_folder(None)
    found = []
    with tempfile.TemporaryDirectory(prefix="fastserve-") as folder:
        for case in wanted:
            found += [
                await run_case(case, model, Path(folder), arguments.profile)
                for _ in range(arguments.repeat)
            ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="fastserve.bench.gateway_speed", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder with a tokenizer (default: the model)")
    parser.add_argument("--rate", type=float, default=20_000.0, help="tokens/s that are offered")
    parser.add_argument("--streams", type=int, default=256, help="of the steady case")
    parser.add_argument("--waves", type=int, default=4, help="requests per stream of that case")
    parser.add_argument("--short-streams", type=int, default=2_000, help="of the other case")
    parser.add_argument("--case", choices=["steady", "many"], help="only this one")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--profile", type=Path, help="py-spy stacks of the gateway go there")
    parser.add_argument("--json", action="store_true", help="a JSON object per case")
    arguments = parser.parse_args()
    raise_file_limit()
    try:
        found = uvloop.run(end_on_sigterm(_run(arguments)))
    except StartError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.json:
        for row in found:
            print(json.dumps(row))
    else:
        display(_table(found))
        for row in found:
            for why, count in row["errors"].items():
                print(f"{row['case']}: {count} x {why}")
    return 1 if any(row["failed"] for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
