"""A service process from outside: readiness, signals, exit status, log lines."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

SERVICE = """
import asyncio, sys
from prometheus_client import CollectorRegistry, Counter
from fastserve.common.errors import StartupError
from fastserve.common.lifecycle import announce_ready, run_service
from fastserve.common.settings import ServiceSettings
from fastserve.common.telemetry import serve_metrics

async def main(settings: ServiceSettings, stop: asyncio.Event) -> None:
    if settings.log_level == "error":
        raise StartupError("the example cannot start: say why")
    registry = CollectorRegistry()
    Counter("example", "help", registry=registry).inc()
    port = serve_metrics(registry, settings.metrics_host, settings.metrics_port)
    announce_ready(settings, metrics_port=port)
    print("up", flush=True)
    await stop.wait()

sys.exit(run_service("example", ServiceSettings, main))
"""


def test_ready_file_metrics_and_clean_stop(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    process = subprocess.Popen(
        [sys.executable, "-c", SERVICE, "--ready-file", str(ready)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        info = json.loads(ready.read_text())
        assert info["pid"] == process.pid
        with urllib.request.urlopen(
            f"http://127.0.0.1:{info['metrics_port']}/metrics", timeout=10
        ) as response:
            assert b"example_total 1.0" in response.read()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    lines = [json.loads(line) for line in errors.splitlines()]
    assert [line["message"] for line in lines] == ["starting", "ready", "stopped"]
    assert all(line["service"] == "example" for line in lines)
    assert lines[0]["settings"]["log_level"] == "info"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--log-level", "error"], "fastserve-example: the example cannot start: say why"),
        (["--log-level", "loud"], "fastserve-example: log level 'loud' is not one of"),
        (["--metrics-port", "70000"], "fastserve-example: metrics_port: "),
    ],
)
def test_refusal_is_one_sentence_and_status_2(flags: list[str], sentence: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVICE, *flags],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert any(line.startswith(sentence) for line in done.stderr.splitlines())
    assert "Traceback" not in done.stderr
