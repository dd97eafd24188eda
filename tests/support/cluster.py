"""Two of everything as processes, each of which can be stopped in order, killed and started again.

    gateway-0, gateway-1 ─▶ scheduler-0, scheduler-1 ─▶ worker-0, worker-1 ─▶ sidecar-0, sidecar-1

All but the gateways keep their addresses; `gateways` has the URLs of those that run.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.pod import Pod
from support.processes import Running, service
from support.valkey import Valkey
from support.waiting import eventually_async

_STOP_S = 40.0


class Cluster:
    """Use inside the `stack`, which stops all of it."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        valkey: Valkey,
        stack: contextlib.ExitStack,
        *,
        pods: int = 2,
        device_blocks: int = 160,
        scheduler_flags: tuple[str, ...] = (),
        pod_flags: tuple[str, ...] = (),
        grace_s: float = 8.0,
    ) -> None:
        """device_blocks: of 8 tokens, per worker; the host has as many. grace_s: of all processes
        to end in order."""
        self.folder, self.model, self.valkey, self.stack = folder, model, valkey, stack
        self.gateways: list[str] = []
        self.running: dict[str, Running] = {}
        self._scheduler_flags = scheduler_flags
        self._grace = ("--shutdown-timeout", str(grace_s))
        token = folder / "peer-token"
        token.write_text("secret\n")
        peers = ("--peer-listen", "127.0.0.1:0", "--peer-token-file", str(token))
        self.pods: list[Pod] = []

        def pod(at: int) -> Pod:
            own = folder / f"p{at}"
            own.mkdir()
            return Pod(
                own,
                model,
                stack,
                device_blocks,
                device_blocks,
                worker_id=f"w{at}",
                worker_flags=(*self._grace, "--max-model-len", "512", *pod_flags),
                sidecar_flags=(*self._grace, *peers),
            )

        # A start is mostly imports on one core.
        with ThreadPoolExecutor(2) as threads:
            self.pods += threads.map(pod, range(pods))
            for start in (self._start_scheduler, self._start_gateway):
                list(threads.map(start, range(2)))

    @property
    def components(self) -> list[str]:
        """In the order of a careful update."""
        pods = range(len(self.pods))
        return [
            *(f"gateway-{at}" for at in range(2)),
            *(f"scheduler-{at}" for at in range(2)),
            *(f"worker-{at}" for at in pods),
            *(f"sidecar-{at}" for at in pods),
        ]

    def process(self, name: str) -> Running:
        """Of a component."""
        kind, _, at = name.rpartition("-")
        if kind == "worker":
            return self.pods[int(at)].worker
        if kind == "sidecar":
            return self.pods[int(at)].sidecar
        return self.running[name]

    async def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and wait for its end; its exit status."""
        running = self.process(name)
        running.process.send_signal(number)
        if number == signal.SIGTERM and name.startswith("gateway"):
            self.gateways.remove(f"http://{running.info['address']}")
        code = await asyncio.to_thread(running.process.wait, _STOP_S)
        if number == signal.SIGKILL and name.startswith("gateway"):
            self.gateways.remove(f"http://{running.info['address']}")
        return code

    async def start(self, name: str, *, settle: bool = True) -> None:
        """Again; returns once it is ready, and with `settle` connected to the others."""
        kind, _, at = name.rpartition("-")
        begin: Callable[[], object] = {
            "gateway": lambda: self._start_gateway(int(at)),
            "scheduler": lambda: self._start_scheduler(int(at)),
            "worker": lambda: self._start_pod_part("worker", int(at)),
            "sidecar": lambda: self._start_pod_part("sidecar", int(at)),
        }[kind]
        await asyncio.to_thread(begin)
        if settle:
            await eventually_async(self.settled, f"all connected after {name} came back", 30)

    async def settled(self) -> bool:
        """Whether a scheduler leads and is connected to all workers, none of which drains."""
        for at in range(2):
            found = await asyncio.to_thread(self.running[f"scheduler-{at}"].metrics)
            names = ("leader", "workers_connected", "workers_draining")
            shown = [found.get(f'fastserve_{name}{{shard="0"}}', 0.0) for name in names]
            if shown == [1, len(self.pods), 0]:
                return True
        return False

    def kill(self) -> None:
        """At the end of a test that has seen all: sooner than one orderly end after the other."""
        for name in self.components:
            self.process(name).kill()

    def _start_pod_part(self, part: str, at: int) -> None:
        getattr(self.pods[at], f"start_{part}")()

    def _start_scheduler(self, at: int) -> None:
        workers = ",".join(pod.address for pod in self.pods)
        self.running[f"scheduler-{at}"] = self.stack.enter_context(
            service(
                "fastserve.scheduler",
                self.folder,
                *("--listen", f"unix:{self.folder}/s{at}", "--redis-url", self.valkey.url),
                *("--workers", workers, *self._grace, *self._scheduler_flags),
            )
        )

    def _start_gateway(self, at: int) -> None:
        running = self.stack.enter_context(
            service(
                "fastserve.gateway",
                self.folder,
                *("--port", "0", "--model", str(self.model), *self._grace),
                *(f"--scheduler=unix:{self.folder}/s{one}" for one in range(2)),
            )
        )
        self.running[f"gateway-{at}"] = running
        self.gateways.append(f"http://{running.info['address']}")

    def logs(self) -> str:
        """The last lines of everything."""
        files = sorted(self.folder.rglob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in files)
