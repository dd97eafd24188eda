"""The containers of the chart as plain processes: the commands, probes and environment that it
renders, with paths and addresses replaced and nothing added, serve a streamed answer."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.chart import NAMESPACE, Manifest, containers, environment, manifests_of, pods, texts
from support.services import metrics
from support.valkey import server_binary
from support.waiting import eventually

TLS = Path(__file__).parents[1] / "support" / "tls"
_HOST = re.compile(rf"([\w.-]+)\.{NAMESPACE}\.svc\.cluster\.local:(\d+)")
_ORDER = ("valkey", "kv-offload", "worker", "scheduler", "gateway")
_METRICS = {"gateway": "http", "kv-offload": "kv-metrics"}
_START_S = 60.0
_PERIOD_S = 0.1  # of probes
_LESS = {
    "kvSidecar": {"hostMemory": "64Mi"},
    "worker": {"settings": {"threads": 1, "kv_blocks": 256, "max_num_batched_tokens": 64}},
}
_PLAIN: dict[str, Any] = _LESS
_MUTUAL_TLS: dict[str, Any] = {
    **_LESS,
    "tls": {
        "enabled": True,
        "certManager": {"enabled": False},
        "existingSecrets": {"gateway": "g", "scheduler": "s", "worker": "w"},
    },
}


@dataclass
class Cluster:
    """One pod of each kind, on loopback."""

    manifests: list[Manifest]
    paths: dict[str, Path]
    logs: Path
    ports: dict[tuple[str, int], int] = field(default_factory=dict)  # container, its port
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    held: list[socket.socket] = field(default_factory=list)  # one per port

    def __post_init__(self) -> None:
        self.pod_of = {
            c["name"]: (owner.split()[1], pod)
            for owner, pod in pods(self.manifests)
            for c in containers(pod)
        }
        self.container = {c["name"]: c for _, pod in pods(self.manifests) for c in containers(pod)}
        self.service = {
            m["metadata"]["name"]: m["spec"] for m in self.manifests if m["kind"] == "Service"
        }
        for name, found in self.container.items():
            for port in found.get("ports", []):
                self.held.append(held := _hold_a_port())
                self.ports[name, port["containerPort"]] = held.getsockname()[1]

    def here(self, name: str, text: str) -> str:
        """`text` of a container's environment or arguments, for this machine."""
        for path, replacement in self.paths.items():
            if text.removeprefix("unix:").startswith(path):
                return text.replace(path, str(replacement))
        text = _HOST.sub(lambda match: self._called(match[1], int(match[2])), text)
        if text.endswith(".svc"):  # the name in a certificate
            return "sidecar.test"
        host, _, port = text.rpartition(":")
        if host == "0.0.0.0":
            return f"127.0.0.1:{self.ports[name, int(port)]}"
        if text == "0.0.0.0":
            return "127.0.0.1"
        if text.isdigit() and (name, int(text)) in self.ports:
            return str(self.ports[name, int(text)])
        return text

    def _called(self, host: str, port: int) -> str:
        """Whom a client in the cluster reaches by this name."""
        service = self.service[host.rpartition(".")[2]]
        target = next(p["targetPort"] for p in service["ports"] if p["port"] == port)
        for name, (owner, pod) in self.pod_of.items():
            if not service["selector"].items() <= pod["metadata"]["labels"].items():
                continue
            if "." in host:
                assert host.partition(".")[0] == f"{owner}-0", f"nobody is called {host}"
            for open_port in self.container[name].get("ports", []):
                if open_port["name"] == target:
                    return f"127.0.0.1:{self.ports[name, open_port['containerPort']]}"
        raise AssertionError(f"nobody answers at {host}:{port}")

    def env(self, name: str) -> dict[str, str]:
        found = {}
        for variable, value in environment(self.container[name]).items():
            pod_name = value == {"fieldRef": {"fieldPath": "metadata.name"}}
            text = f"{self.pod_of[name][0]}-0" if pod_name else value
            found[variable] = self.here(name, text)
        # The image has these two on its path.
        path = f"{Path(sys.executable).parent}:{server_binary().parent}"
        return {"PATH": path, **found}

    def command(self, name: str) -> list[str]:
        found = self.container[name]
        words = [*found["command"], *found.get("args", [])]
        return [self.here(name, str(word)) for word in words]

    def start(self, name: str) -> None:
        with (self.logs / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                self.command(name), env=self.env(name), cwd="/", stdout=log, stderr=log
            )

    async def up(self, name: str, kind: str = "startup") -> None:
        """Wait until a probe succeeds, as the kubelet does."""
        probe = self.container[name][f"{kind}Probe"]
        deadline = time.monotonic() + _START_S
        while not self.probe(name, probe):
            late = time.monotonic() > deadline
            assert self.running[name].poll() is None and not late, f"{kind}: {self.log(name)}"
            await asyncio.sleep(_PERIOD_S)

    def probe(self, name: str, probe: Manifest) -> bool:
        named = {p["name"]: p["containerPort"] for p in self.container[name]["ports"]}
        (kind, check), *_ = [(k, v) for k, v in probe.items() if isinstance(v, dict)]
        port = self.ports[name, int(named.get(check["port"]) or check["port"])]
        if kind == "grpc":
            return _serving(f"127.0.0.1:{port}", check["service"])
        if kind == "httpGet":
            return _answers(f"http://127.0.0.1:{port}{check['path']}")
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return True
        return False

    def series(self, name: str) -> dict[str, float]:
        """What Prometheus gets at the port that a ServiceMonitor names."""
        named = {p["name"]: p["containerPort"] for p in self.container[name]["ports"]}
        port = named[_METRICS.get(name, "metrics")]
        url = f"http://127.0.0.1:{self.ports[name, port]}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {key: float(value) for key, _, value in pairs}

    def log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(errors="replace")[-4000:]

    def stop(self, name: str) -> int:
        """As the kubelet does; the exit status."""
        process = self.running.pop(name)
        process.terminate()
        grace = self.pod_of[name][1]["spec"].get("terminationGracePeriodSeconds", 30)
        try:
            return process.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)
            raise AssertionError(f"{name} did not end in {grace} s:\n{self.log(name)}") from None


def _hold_a_port() -> socket.socket:
    """A free port that the system gives to nobody else, for a connection or a server, until this
    socket is closed; a server that asks for it by its number may have it."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def _serving(address: str, service: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


@contextlib.contextmanager
def cluster(values: dict[str, Any], folder: Path, model: Path) -> Iterator[Cluster]:
    places = {"run": folder / "run", "shm": folder / "shm", "data": folder / "data"}
    for place in places.values():
        place.mkdir()
    certificate = folder / "tls"
    certificate.mkdir()
    for name, file in (("tls.crt", "peer.crt"), ("tls.key", "peer.key"), ("ca.crt", "ca.crt")):
        shutil.copy(TLS / file, certificate / name)
    paths = {
        "/models/SmolLM2-135M-Instruct": model,
        "/run/fastserve": places["run"],
        "/dev/shm": places["shm"],
        "/data": places["data"],
        "/etc/fastserve/tls": certificate,
    }
    made = Cluster(manifests_of(texts(values)), paths, folder)
    try:
        yield made
    finally:
        for process in made.running.values():
            process.kill()
            process.wait(timeout=10)
        for held in made.held:
            held.close()


@pytest.mark.parametrize("values", [_PLAIN, _MUTUAL_TLS], ids=["plain", "tls"])
async def test_the_containers_serve_an_answer_together(
    values: dict[str, Any], tmp_path: Path, default_model_folder: Path
) -> None:
    with cluster(values, tmp_path, default_model_folder) as made:
        assert set(made.container) == {*_ORDER, "test"}
        made.start("kv-offload")  # a sidecar is up before its worker; nothing else has an order
        await made.up("kv-offload")
        for name in reversed(_ORDER):
            if name != "kv-offload":
                made.start(name)
        for name in _ORDER:
            await made.up(name)
        for name in _ORDER[1:]:
            await made.up(name, "readiness")
            await made.up(name, "liveness")

        # `helm test`
        answer = subprocess.run(
            made.command("test"),
            env=made.env("test"),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        logs = "".join(f"\n== {name}\n{made.log(name)}" for name in _ORDER)
        assert answer.returncode == 0, f"{answer.stderr}{logs}"
        assert int(answer.stdout.split()[0]) >= 3, answer.stdout

        worker = '{shard="smollm2",worker="fastserve-smollm2-worker-0"}'
        queued = f"fastserve_queued_work_seconds{worker}"  # written every second
        await eventually(lambda: made.series("scheduler").get(queued) == 0, queued)
        seen = {name: made.series(name) for name in _ORDER[1:]}
        first = 'vllm:time_to_first_token_seconds_count{model_name="SmolLM2-135M-Instruct"}'
        assert seen["gateway"][first] == 1
        for name, series in seen.items():
            told = {key.partition("{")[0] for key in series}
            told = {n for n in told if n.startswith(("fastserve_", "vllm:"))}
            assert {n for n in told if not n.endswith("_created")} <= set(metrics()), name

        began = time.monotonic()
        for name in reversed(_ORDER):
            assert made.stop(name) == 0, made.log(name)
        assert time.monotonic() - began < 60


async def test_a_missing_variable_is_noticed(tmp_path: Path) -> None:
    """The test above adds nothing of its own to what the chart renders."""
    with cluster(_PLAIN, tmp_path, tmp_path) as made:
        variables = made.container["scheduler"]["env"]
        variables.remove(next(v for v in variables if v["name"] == "FASTSERVE_REDIS_URL"))
        made.start("scheduler")
        assert made.running["scheduler"].wait(timeout=30) == 2
        assert "redis_url: Field required" in made.log("scheduler")
