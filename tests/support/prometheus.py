"""A real Prometheus, if one is installed (Debian: apt-get install prometheus)."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

BINARY = shutil.which("prometheus")
_START_S = 20.0
_LISTENING = re.compile(r'"Listening on" address=(127\.0\.0\.1:\d+)')


class Prometheus:
    """A running server."""

    def __init__(self, client: httpx.Client) -> None:
        self._http = client

    def _get(self, path: str, **params: str) -> Any:
        reply = self._http.get(f"/api/v1/{path}", params=params).json()
        assert reply["status"] == "success", reply
        return reply["data"]

    def query(self, expression: str) -> list[float]:
        """Values of all series now. NaN (a quantile of nothing) counts as no value."""
        values = [float(s["value"][1]) for s in self._get("query", query=expression)["result"]]
        return [value for value in values if value == value]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]


@contextlib.contextmanager
def prometheus(
    folder: Path, targets: Mapping[str, str], rules: list[dict[str, Any]]
) -> Iterator[Prometheus]:
    """Scrape every second. targets: metrics URL by the name that becomes the label `pod`."""
    assert BINARY is not None
    folder.mkdir(parents=True, exist_ok=True)
    rules_file, log = folder / "rules.yml", folder / "log"
    rules_file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    jobs = [
        {
            "job_name": name,
            "static_configs": [
                {
                    "targets": [url.removeprefix("http://").removesuffix("/metrics")],
                    "labels": {"pod": name, "namespace": "llm"},
                }
            ],
        }
        for name, url in targets.items()
    ]
    times = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config = {"global": times, "rule_files": [str(rules_file)], "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        *[BINARY, f"--config.file={folder / 'prometheus.yml'}"],
        *[f"--storage.tsdb.path={folder / 'data'}", "--web.listen-address=127.0.0.1:0"],
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        with httpx.Client(
            base_url=f"http://{_address(process, log)}", timeout=20, trust_env=False
        ) as client:
            yield Prometheus(client)
    finally:
        process.terminate()
        process.wait(timeout=20)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_S
    while (found := _LISTENING.search(log.read_text())) is None:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return found[1]
