"""The benchmark of the gateway: its stub must speak the contract of the day."""

from __future__ import annotations

import json
import subprocess
import sys


def test_streams_go_through_a_gateway_in_front_of_the_stub() -> None:
    asked = ["--case", "many", "--short-streams", "12", "--rate", "1000", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "fastserve.bench.gateway_speed", *asked],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["failed"], found["errors"]) == (0, {})
    assert found["streams"] * found["tokens_per_stream"] == 12 * 16
    assert found["tokens_per_s"] > 0
    assert found["tokens_per_cpu_s"] > 0
