"""The containers of docker-compose.yml, used and killed. `tests/compose/run` builds them first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx

SERVICES = (
    "gateway",
    "prometheus",
)  # and all that they depend on; Jaeger and Grafana are not to be had
NEEDED = {"gateway", "scheduler", "worker", "kv-offload", "valkey", "prometheus"}
TOKENS = 120
BODY = {
    "model": "SmolLM2-135M-Instruct",
    "prompt": "Write a long story about a lighthouse keeper and his daughter.\n\n",
    "max_tokens": TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}


_STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - _STARTED:5.0f} s  {text}", flush=True)


def run(*command: str) -> str:
    """What it prints. What it complains of is shown if it fails."""
    done = subprocess.run(command, check=False, text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout.strip()


def container(service: str) -> str:
    return run("docker-compose", "ps", "-q", service)


def inspect(service: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("docker", "inspect", container(service)))[0]
    return found


def wait(what: str, done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.2)


def url(service: str, port: int) -> str:
    return f"http://{run('docker-compose', 'port', service, str(port))}"


def stream(base: str, on_token: Callable[[int], None]) -> str:
    """The text of one streamed answer; `on_token` hears how many events came."""
    text, events = "", 0
    with httpx.stream(
        "POST", f"{base}/v1/completions", json=BODY, timeout=120, trust_env=False
    ) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                text += "".join(choice["text"] for choice in chunk["choices"])
                events += 1
                on_token(events)
    return text


def check_rights() -> None:
    for service in NEEDED - {"valkey", "prometheus"}:
        found = inspect(service)
        assert found["Config"]["User"] == "10001:10001", service
        assert found["HostConfig"]["ReadonlyRootfs"], service
        has_torch = subprocess.run(
            ["docker-compose", "exec", "-T", service, "python", "-c", "import torch"],
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert (has_torch.returncode == 0) == (service == "worker"), service


def check_scrapes() -> None:
    base = url("prometheus", 9090)

    def all_up() -> bool:
        reply = httpx.get(f"{base}/api/v1/query", params={"query": "up"}, trust_env=False).json()
        series = reply["data"]["result"]
        return len(series) == 4 and all(one["value"][1] == "1" for one in series)

    wait("Prometheus scrapes all four services", all_up, 60)


def check_top() -> str:
    address = url("scheduler", 7070).removeprefix("http://")
    os.environ["COLUMNS"] = "100"
    return run(sys.executable, "-m", "fastserve.cli", "top", "--once", "--scheduler", address)


def kill_worker(base: str, undisturbed: str) -> None:
    """A crash as the kernel would do it: `docker kill` would tell Docker not to restart it."""
    pid = inspect("worker")["State"]["Pid"]

    def on_token(events: int) -> None:
        if events == 20:
            os.kill(pid, signal.SIGKILL)

    assert stream(base, on_token) == undisturbed, "the answer changed"
    state = inspect("worker")
    assert state["RestartCount"] == 1 and state["State"]["Pid"] != pid


def main() -> int:
    try:
        run("docker-compose", "up", "--detach", *SERVICES)
        base = url("gateway", 8000)
        say("all containers are up")
        wait("the gateway is ready", lambda: ready(base), 120)
        undisturbed = stream(base, lambda events: None)
        assert len(undisturbed) > TOKENS
        say(f"an answer streamed: {undisturbed[:50]!r} ...")
        check_rights()
        say("every service runs as 10001, cannot write to its image, and only the worker has torch")
        check_scrapes()
        say("Prometheus scrapes all four services")
        view = check_top()
        assert "SmolLM2" in view and "not connected" not in view, view
        say(f"fastserve top shows\n{view}")
        kill_worker(base, undisturbed)
        say("the worker was killed and restarted; the stream went on with the same text")
    except BaseException:
        subprocess.run(["docker-compose", "ps"], check=False)
        subprocess.run(["docker-compose", "logs", "--tail=40"], check=False)
        raise
    finally:
        run("docker-compose", "down", "--volumes", "--timeout", "30")
    ours = f"label=com.docker.compose.project={os.environ['COMPOSE_PROJECT_NAME']}"
    for kind in (["ps", "--all"], ["volume", "ls"], ["network", "ls"]):
        left = run("docker", *kind, "--quiet", "--filter", ours)
        assert not left, f"docker {kind[0]}: left behind: {left}"
    say("everything is down, and nothing is left")
    return 0


def ready(base: str) -> bool:
    try:
        return httpx.get(f"{base}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    sys.exit(main())
