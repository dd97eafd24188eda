"""Real service processes for tests: started with a ready file, stopped by pid."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Running:
    """A service that has announced itself ready."""

    process: subprocess.Popen[bytes]
    info: dict[str, Any]
    log: Path

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=30)

    def metrics(self) -> dict[str, float]:
        """Series with labels -> value."""
        port = self.info.get("metrics_port") or self.info["port"]  # a gateway has one for all
        url = f"http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}


@contextlib.contextmanager
def service(
    module: str,
    folder: Path,
    *flags: str,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[Running]:
    """Run `python -m module flags` until the block ends; an error shows its log.

    env: beside that of this process. prefix: before the command."""
    ready = folder / f"{module}.{time.monotonic_ns()}.ready"
    log = ready.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, "--ready-file", str(ready), *flags],
            stdout=output,
            stderr=output,
            env={**os.environ, **(env or {})},
        )
    try:
        deadline = time.monotonic() + timeout
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{module} did not start:\n{log.read_text()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
        yield Running(process, json.loads(ready.read_text()), log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=20)
