"""The whole system as users start it: `fastserve up`, real processes, the default model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

MODEL = "SmolLM2-135M-Instruct"
_START_S = 100.0  # the first run converts the model
_STOP_S = 60.0


class Deployment:
    """A running `fastserve up` and its state folder."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self.folder = folder

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state

    @property
    def url(self) -> str:
        return str(self.state["url"])

    def service(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.state["services"][name]
        return found

    def metric(self, service: str, name: str, **labels: str) -> float:
        """Sum of a metric's samples that carry the labels; 0 if there is none."""
        text = httpx.get(self.service(service)["metrics"], timeout=10).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def leader(self) -> str:
        """The scheduler that leads."""
        names = (name for name in self.state["services"] if name.startswith("scheduler"))
        return str(next(name for name in names if self.metric(name, "fastserve_leader")))

    def kill(self, name: str) -> None:
        """SIGKILL a service; it is restarted after a moment."""
        os.kill(self.service(name)["pid"], signal.SIGKILL)

    def restarted(self, name: str, times: int = 1) -> bool:
        service = self.service(name)
        return bool(service["restarts"] >= times and service["state"] == "ready")

    def logs(self) -> str:
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted((self.folder / "logs").glob("*.log"))
        )

    def stop(self) -> int:
        """As with Ctrl-C; returns the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=_STOP_S)


def command(*arguments: str) -> list[str]:
    """The `fastserve` command line."""
    return [sys.executable, "-m", "fastserve.cli", *arguments]


@contextlib.contextmanager
def deployment(folder: Path, *flags: str, **env: str) -> Iterator[Deployment]:
    """Start everything on a free port, wait until it is ready, stop it and see that all is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "up.out"
    with output.open("wb") as out:
        process = subprocess.Popen(
            command("up", "--port", "0", "--state-dir", str(folder), *flags),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, **env},
        )
    running = Deployment(process, folder)
    children: list[psutil.Process] = []
    try:
        _wait_ready(running, output)
        children = psutil.Process(process.pid).children(recursive=True)
        try:
            yield running
        except BaseException:
            print(running.logs())
            raise
        children = psutil.Process(process.pid).children(recursive=True)
        assert running.stop() == 0, output.read_text()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        _, left = psutil.wait_procs(children, timeout=20)
        for orphan in left:
            orphan.kill()
    assert not left, f"processes are left behind: {left}"


def _wait_ready(running: Deployment, output: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(FileNotFoundError):
            if running.state["ready"]:
                return
        if running.process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"not ready:\n{output.read_text()}\n{running.logs()}")
        time.sleep(0.05)
