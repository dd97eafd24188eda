"""The `fastserve` command as users type it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client import CollectorRegistry, Gauge, start_http_server
from typer.testing import CliRunner

from fastserve.cli.errors import CliError
from fastserve.cli.main import app
from fastserve.cli.state import StateFolder
from support.deployment import command

_COMMANDS = ("up", "down", "status", "chat", "logs", "version")
_ALL = {"valkey", "kv-offload", "model", "worker", "scheduler", "gateway"}


def invoke(*arguments: str, **options: Any) -> Any:
    return CliRunner().invoke(app, list(arguments), **options)


@pytest.mark.parametrize("name", _COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_each_command(name: str, flag: str) -> None:
    result = invoke(name, flag)
    assert result.exit_code == 0 and f"{name} " in plain(result.output)


def plain(text: str) -> str:
    """Without colours, which some CI systems ask for."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_help_names_all_commands() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(f" {name} " in plain(result.output) for name in _COMMANDS)
    assert invoke().exit_code == 2  # no command at all: the same text, and an error


def test_help_of_up_has_examples() -> None:
    output = plain(invoke("up", "--help").output)
    assert "Examples" in output
    examples = [line for line in output.splitlines() if "fastserve up --" in line]
    assert len(examples) >= 3 and any("--detach" in line for line in examples)


def test_the_version() -> None:
    result = invoke("version")
    assert result.exit_code == 0
    assert result.output == f"fastserve {version('fastserve-cli')}\n"


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_port_that_is_none(tmp_path: Path, port: str) -> None:
    result = invoke("up", "--port", port, "--state-dir", str(tmp_path))
    assert result.exit_code == 2 and "--port" in plain(result.output)


def test_logs_of_an_unknown_service(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    with pytest.raises(CliError, match="no log of 'redis' \\(there are: none\\)"):
        invoke("logs", "redis", "--state-dir", str(tmp_path), catch_exceptions=False)
    for name in ("worker", "gateway"):
        folder.log(name).touch()
    with pytest.raises(CliError, match="no log of 'redis' \\(there are: gateway, worker\\)"):
        invoke("logs", "redis", "--state-dir", str(tmp_path), catch_exceptions=False)


def test_the_last_lines_of_a_log(tmp_path: Path) -> None:
    StateFolder(tmp_path).log("worker").write_bytes(b"one\ntwo\nthr\xffee\n")
    here = ("--state-dir", str(tmp_path))
    assert invoke("logs", "worker", "-n", "2", *here).output == "two\nthr\ufffdee\n"
    assert invoke("logs", "worker", *here).output == "one\ntwo\nthr\ufffdee\n"


def test_nothing_runs(tmp_path: Path) -> None:
    here = ("--state-dir", str(tmp_path))
    for_people = invoke("status", *here)
    assert for_people.exit_code == 3 and "fastserve up" in for_people.output
    for_programs = invoke("status", "--json", *here)
    assert for_programs.exit_code == 3
    assert json.loads(for_programs.output) == {"running": False}
    down = invoke("down", *here)
    assert down.exit_code == 0 and down.output == "FastServe is not running\n"


def test_status_while_the_services_start(tmp_path: Path) -> None:
    service = {"state": "starting", "pid": 7, "restarts": 2, "metrics": None}
    StateFolder(tmp_path).write(
        {"url": "http://h:1", "ready": False, "model": "m", "services": {"scheduler": service}}
    )
    result = invoke("status", "--state-dir", str(tmp_path))
    assert result.exit_code == 0
    assert "http://h:1/v1" in result.output and "not ready yet" in result.output
    assert "starting" in result.output
    found = json.loads(invoke("status", "--json", "--state-dir", str(tmp_path)).output)
    assert found["running"] is True and found["queue"] is None


def test_chat_with_nobody_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    for given in (url, f"{url}/v1", f"{url}/v1/"):
        result = run("chat", "Hello", "--url", given, "--state-dir", str(tmp_path))
        assert result.returncode == 1 and result.stdout.strip() == ""
        assert f"nothing answers at {url}:" in result.stderr
        assert "Traceback" not in result.stderr


def test_a_state_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("status", "--state-dir", str(tmp_path / "file" / "state"))
    assert result.returncode == 1
    assert "cannot use the state folder" in result.stderr and "Traceback" not in result.stderr


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, **env},
    )


@dataclass
class Place:
    """Where an `up` of a test runs, so that all it leaves can be seen."""

    folder: Path
    temporary: Path
    mark: str

    @property
    def env(self) -> dict[str, str]:
        return {"TMPDIR": str(self.temporary), "FASTSERVE_TEST_MARK": self.mark}

    @property
    def here(self) -> tuple[str, ...]:
        return ("--port", "0", "--state-dir", str(self.folder))

    def up(self, *flags: str, output: int, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command("up", *self.here, *flags),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.env},
            **options,
        )

    def states(self) -> dict[str, str]:
        """State of each service, as the state file has it."""
        try:
            state = json.loads((self.folder / "state.json").read_text())
        except FileNotFoundError:
            return {}
        return {name: service["state"] for name, service in state["services"].items()}

    def processes(self) -> list[psutil.Process]:
        """All that carry this place's mark in their environment and still run."""
        found = []
        for process in psutil.process_iter():
            try:
                mark = process.environ().get("FASTSERVE_TEST_MARK")
                if mark == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def assert_nothing_left(self) -> None:
        assert self.processes() == []
        assert list(self.temporary.iterdir()) == []  # the sockets
        assert not (self.folder / "state.json").exists()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    temporary = Path(tempfile.mkdtemp(prefix="fs-", dir="/tmp"))  # short, for sockets
    place = Place(tmp_path / "state", temporary, str(tmp_path))
    yield place
    for process in place.processes():
        process.kill()
    shutil.rmtree(temporary)


def await_(check: Callable[[], object], what: str, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < deadline, f"{what} did not come within {timeout} s"
        time.sleep(0.02)


def await_worker(place: Place) -> None:
    """Some services are ready, the worker is not: it takes seconds to import torch."""
    await_(
        lambda: (
            place.states().get("worker") == "starting"
            and "ready" in (place.states().get("valkey"), place.states().get("scheduler"))
        ),
        "a worker that starts",
    )


def test_a_service_that_dies_at_start(place: Place) -> None:
    result = run("up", "--model", "/nonexistent", *place.here, **place.env)
    assert result.returncode == 1
    assert "/nonexistent does not exist" in result.stderr
    assert str(place.folder / "logs" / "model.log") in result.stderr.replace("\n", "")
    assert "Traceback" not in result.stderr + result.stdout
    place.assert_nothing_left()


def test_a_service_that_dies_at_start_in_the_background(place: Place) -> None:
    result = run("up", "--detach", "--model", "/nonexistent", *place.here, **place.env)
    assert result.returncode == 1
    assert "/nonexistent does not exist" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    place.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_starting_ends_all(
    place: Place, default_model_folder: Path, number: signal.Signals
) -> None:
    process = place.up(output=subprocess.PIPE)
    await_worker(place)
    assert len(place.processes()) > 2
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert b"Traceback" not in output and output.endswith(b"stopped\n")
    place.assert_nothing_left()


def test_a_reader_that_goes_away_ends_all(place: Place, default_model_folder: Path) -> None:
    """`fastserve up | head -1`."""
    process = place.up(output=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=60)
    place.assert_nothing_left()


def test_a_terminal_that_is_closed_ends_all(place: Place, default_model_folder: Path) -> None:
    ours, theirs = pty.openpty()
    process = place.up(output=theirs, start_new_session=True)
    os.close(theirs)
    await_worker(place)
    os.close(ours)  # what is written from now on is an error
    process.send_signal(signal.SIGHUP)
    process.wait(timeout=60)
    place.assert_nothing_left()


def test_nohup_is_respected(place: Place, default_model_folder: Path) -> None:
    script = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    script += "os.execv(sys.executable, sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command("up", *place.here)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, **place.env},
    )
    await_worker(place)
    process.send_signal(signal.SIGHUP)
    await_(lambda: place.states().get("scheduler") == "ready", "the scheduler")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    place.assert_nothing_left()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children only on Linux")
def test_kill_9_leaves_no_service_and_up_can_start_again(
    place: Place, default_model_folder: Path
) -> None:
    process = place.up(output=subprocess.DEVNULL)
    await_worker(place)
    process.kill()
    process.wait(timeout=10)
    await_(lambda: place.processes() == [], "the end of all services", timeout=20)
    assert run("status", "--state-dir", str(place.folder)).returncode == 3
    again = place.up(output=subprocess.DEVNULL)
    await_(lambda: place.processes() and StateFolder(place.folder).read(), "the next one")
    again.send_signal(signal.SIGINT)
    assert again.wait(timeout=60) == 0


def test_ctrl_c_while_waiting_for_the_background_ends_all(
    place: Place, default_model_folder: Path
) -> None:
    process = place.up("--detach", output=subprocess.PIPE)
    await_worker(place)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in output and output.endswith(b"stopped\n")
    place.assert_nothing_left()


def test_ctrl_c_while_the_background_is_being_started(tmp_path: Path) -> None:
    """It comes within Popen, when the child is there and nobody has its pid yet."""
    script = f"""
import os, signal, subprocess
from pathlib import Path
from fastserve.cli import up
from fastserve.cli.stack import Options
from fastserve.cli.state import StateFolder

class Popen(subprocess.Popen):
    def __init__(self, argv, **options):
        super().__init__(["sleep", "60"], **options)
        Path({str(tmp_path)!r}, "child").write_text(str(self.pid))
        os.kill(os.getpid(), signal.SIGINT)

subprocess.Popen = Popen
up.detached([], Options(), StateFolder(Path({str(tmp_path)!r})))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    child = int((tmp_path / "child").read_text())
    left = psutil.pid_exists(child)
    if left:
        os.kill(child, signal.SIGKILL)
    assert not left
    assert "KeyboardInterrupt" in result.stderr and "stopped" in result.stdout


def test_up_in_the_background_and_down(place: Place, default_model_folder: Path) -> None:
    key = "sk-secret-of-the-test"
    keys = ("--api-key", key, f"--api-key={key}2")
    up = run("up", "--detach", "--demo", "--threads", "1", *keys, *place.here, **place.env)
    assert up.returncode == 0, up.stderr
    assert "worker      starting" in up.stdout and "gateway     ready" in up.stdout
    state = StateFolder(place.folder).read()
    assert state is not None and state["ready"]
    assert f"{state['url']}/v1" in up.stdout
    running = place.processes()
    assert {service["state"] for service in state["services"].values()} == {"ready"}
    assert {state["pid"]} < {process.pid for process in running}
    assert state["services"].keys() == _ALL
    assert not any(key in word for process in running for word in process.cmdline())

    here = ("--state-dir", str(place.folder))
    assert run("chat", "Hi", "--api-key", key, "--max-tokens", "2", *here).returncode == 0
    assert run("chat", "Hi", "--api-key", f"{key}2", "--max-tokens", "2", *here).returncode == 0
    assert run("chat", "Hi", *here).returncode == 1  # the key is asked for
    again = run("up", "--detach", *place.here, **place.env)
    assert again.returncode == 1 and state["url"] in again.stderr

    down = run("down", *here)
    assert down.returncode == 0, down.stderr
    assert down.stdout == "stopped\n"
    log = run("logs", "up", *here).stdout
    assert "> Explain in" in log and "no demo" not in log  # it has the key, too
    place.assert_nothing_left()
    assert run("status", *here).returncode == 3


def test_status_asks_the_scheduler_that_leads(tmp_path: Path) -> None:
    services = {}
    with contextlib.ExitStack() as stack:
        for name, leads in (("scheduler", 0), ("scheduler-2", 1), ("scheduler-3", 0)):
            registry = CollectorRegistry()
            Gauge("fastserve_leader", "", ["shard"], registry=registry).labels("0").set(leads)
            Gauge("fastserve_durable", "", ["shard"], registry=registry).labels("0").set(leads)
            server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
            stack.callback(thread.join, 10)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            url = f"http://127.0.0.1:{server.server_port}/metrics"
            services[name] = {"state": "ready", "pid": 7, "restarts": 0, "metrics": url}
        StateFolder(tmp_path).write(
            {"url": "http://h:1", "ready": True, "model": "m", "services": services}
        )
        found = json.loads(invoke("status", "--json", "--state-dir", str(tmp_path)).output)
    assert found["queue"] == {"durable": 1.0}
