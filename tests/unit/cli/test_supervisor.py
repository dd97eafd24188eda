"""The supervisor over real child processes that do as they are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastserve.cli.service import Service, Spec, State, ready_file
from fastserve.cli.supervisor import Supervisor

Known = dict[str, dict[str, Any]]

# argv: folder, name, behaviour, then what it was given. Notes its life in the journal.
_FAKE = r"""
import json, os, pathlib, signal, sys, time
folder, name, behaviour, *given = sys.argv[1:]
def note(event):
    line = json.dumps([name, event, os.getpid(), given]) + "\n"
    with open(f"{folder}/journal", "a") as journal:
        journal.write(line)
if behaviour == "die at start":
    sys.exit("I cannot go on")
def end(*_):
    note("stop")
    if behaviour != "stubborn":
        sys.exit(0)
signal.signal(signal.SIGTERM, end)
note("start")
if behaviour == "never ready":
    time.sleep(60)
ready = pathlib.Path(folder, f"{name}.ready")
scratch = ready.with_suffix(".scratch")
scratch.write_text(json.dumps({"pid": os.getpid(), "port": os.getpid() + 1000}))
scratch.replace(ready)
while True:
    time.sleep(60)
"""


class Rig:
    """Fake services, the supervisor over them, and the journal they write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.services: list[Service] = []
        self.changes = 0
        self.now = 1000.0

    def fake(self, name: str, behaviour: str = "", *needs: str, given: str = "") -> None:
        """A service; `given` names the one whose ready values travel in its argv."""

        def argv(known: Known) -> list[str]:
            told = [json.dumps(known[given])] if given else []
            fake = [sys.executable, "-I", "-S", "-c", _FAKE, str(self.folder), name, behaviour]
            return [*fake, *told]

        path = self.folder / f"{name}.ready"
        spec = Spec(
            name,
            argv,
            ready_file(path),
            needs=needs,
            forget=lambda: path.unlink(missing_ok=True),
        )
        self.add(spec)

    def task(self, name: str, code: str) -> None:
        argv = [sys.executable, "-I", "-S", "-c", code]
        self.add(Spec(name, lambda known: argv, lambda: None, once=True))

    def add(self, spec: Spec) -> None:
        self.services.append(Service(spec, self.folder / f"{spec.name}.log", dict(os.environ)))

    def supervise(self, **options: Any) -> Supervisor:
        return Supervisor(self.services, self._changed, **options)

    def _changed(self) -> None:
        self.changes += 1

    def journal(self, event: str) -> list[tuple[str, int, list[str]]]:
        """(name, pid, given) of every such event, in order."""
        path = self.folder / "journal"
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines]
        return [(name, pid, given) for name, found, pid, given in entries if found == event]

    def names(self, event: str) -> list[str]:
        return [name for name, _, _ in self.journal(event)]

    def alive(self) -> list[str]:
        return [name for name, pid, _ in self.journal("start") if psutil.pid_exists(pid)]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    for service in rig.services:
        if service.process is not None:
            service.process.kill()
            service.process.wait(timeout=10)
            service.stopped()  # closes its pipe


def drive(supervisor: Supervisor, done: Callable[[], bool], timeout: float = 20.0) -> None:
    """Step until it is done; an AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    supervisor.run_until(lambda: done() or time.monotonic() > deadline)
    assert done(), {name: str(s.state) for name, s in supervisor.services.items()}


def test_services_start_once_what_they_need_is_ready(rig: Rig) -> None:
    rig.fake("gateway", "", "scheduler", "worker")  # listed first, and yet started last
    rig.fake("scheduler", "", "store", given="store")
    rig.fake("worker", "", "scheduler")
    rig.fake("store")
    supervisor = rig.supervise()
    drive(supervisor, lambda: supervisor.all_ready)
    try:
        assert rig.names("start") == ["store", "scheduler", "worker", "gateway"]
        store = supervisor.services["store"]
        (given,) = next(given for name, _, given in rig.journal("start") if name == "scheduler")
        assert json.loads(given) == store.ready
        assert store.ready["pid"] == store.pid
        assert all(service.seconds is not None for service in rig.services)
        assert rig.changes >= 4
    finally:
        supervisor.stop()


def test_who_needs_a_service_that_is_not_ready_waits(rig: Rig) -> None:
    rig.fake("store", "never ready")
    rig.fake("scheduler", "", "store")
    supervisor = rig.supervise()
    drive(supervisor, lambda: rig.names("start") == ["store"])
    for _ in range(5):
        supervisor.step()
    assert supervisor.services["store"].state is State.STARTING
    assert supervisor.services["scheduler"].state is State.WAITING
    assert supervisor.services["scheduler"].pid is None and not supervisor.all_ready
    supervisor.stop()
    assert rig.alive() == []


def test_the_output_of_a_task_is_handed_on(rig: Rig) -> None:
    rig.task("model", "import sys; print('/models/tiny'); print('converting', file=sys.stderr)")
    rig.fake("worker", "", "model", given="model")
    supervisor = rig.supervise()
    drive(supervisor, lambda: supervisor.all_ready)
    try:
        model = supervisor.services["model"]
        assert model.ready == {"output": "/models/tiny"} and model.pid is None
        assert [json.loads(given) for _, _, (given,) in rig.journal("start")] == [model.ready]
        assert model.log.read_text() == "converting\n"  # the log has what it says, not its output
        for _ in range(3):
            supervisor.step()
        assert model.state is State.READY and model.restarts == 0  # it is done, not dead
    finally:
        supervisor.stop()


def test_a_task_that_fails_holds_up_what_needs_it(rig: Rig) -> None:
    rig.task("model", "import sys; print('half a path'); sys.exit('no such model')")
    rig.fake("worker", "", "model")
    supervisor = rig.supervise()
    drive(supervisor, lambda: supervisor.failed is not None)
    assert supervisor.failed is supervisor.services["model"]
    assert supervisor.services["model"].ready == {}
    assert supervisor.services["model"].log.read_text() == "no such model\n"
    supervisor.stop()
    assert rig.journal("start") == []


def test_death_before_ready_is_a_failure_and_stop_leaves_nothing(rig: Rig) -> None:
    rig.fake("store")
    rig.fake("scheduler", "die at start", "store")
    rig.fake("gateway", "", "scheduler")
    supervisor = rig.supervise()
    drive(supervisor, lambda: supervisor.failed is not None)
    failed = supervisor.services["scheduler"]
    assert supervisor.failed is failed and not supervisor.all_ready
    assert failed.log.read_text() == "I cannot go on\n" and failed.restarts == 0
    assert failed.ended == "ended with status 1"
    for _ in range(3):
        supervisor.step()
    assert failed.state is State.FAILED and failed.pid is None  # it is not tried again
    assert rig.alive() == ["store"]
    supervisor.stop()
    assert rig.alive() == []
    assert failed.state is State.FAILED  # still to be seen after the stop
    assert supervisor.services["store"].state is State.STOPPED
    assert supervisor.services["gateway"].state is State.STOPPED


def test_death_after_ready_is_followed_by_a_restart_with_the_last_ready_values(rig: Rig) -> None:
    rig.fake("store")
    rig.fake("scheduler", "", "store", given="scheduler")
    rig.fake("gateway", "", "scheduler")
    supervisor = rig.supervise()
    drive(supervisor, lambda: supervisor.all_ready)
    scheduler, gateway = supervisor.services["scheduler"], supervisor.services["gateway"]
    first, others = scheduler.ready, (supervisor.services["store"].pid, gateway.pid)
    os.kill(first["pid"], signal.SIGKILL)
    drive(supervisor, lambda: scheduler.state is State.RESTARTING)
    assert scheduler.pid is None and scheduler.restarts == 1
    assert scheduler.ended is not None and "for want of memory" in scheduler.ended
    drive(supervisor, lambda: supervisor.all_ready)
    assert scheduler.ready["pid"] == scheduler.pid != first["pid"]
    lives = [json.loads(given) for name, _, (given,) in _of(rig, "scheduler")]
    assert lives == [{}, first]
    assert (supervisor.services["store"].pid, gateway.pid) == others  # left in peace
    supervisor.stop()
    assert rig.alive() == []


def _of(rig: Rig, name: str) -> list[tuple[str, int, list[str]]]:
    return [entry for entry in rig.journal("start") if entry[0] == name]


def test_restarts_come_after_a_growing_pause_until_it_was_steady(rig: Rig) -> None:
    rig.fake("worker")
    supervisor = rig.supervise(clock=lambda: rig.now)
    drive(supervisor, lambda: supervisor.all_ready)
    worker = supervisor.services["worker"]

    def pause() -> float:
        """Kill it; seconds on the clock until it is started again."""
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        drive(supervisor, lambda: worker.state is State.RESTARTING)
        died = rig.now
        while worker.state is State.RESTARTING:
            assert rig.now < died + 60
            rig.now += 0.25
            supervisor.step()
        drive(supervisor, lambda: worker.state is State.READY)
        return rig.now - died

    assert [pause() for _ in range(6)] == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0]
    rig.now += 31.0
    supervisor.step()
    assert pause() == 0.5
    assert worker.restarts == 7
    supervisor.stop()


def test_a_service_that_was_ready_once_is_tried_again_when_its_restart_dies(rig: Rig) -> None:
    broken = rig.folder / "broken"
    ready = rig.folder / "worker.ready"
    code = f"""
import os, sys, time
if os.path.exists({str(broken)!r}): sys.exit(1)
with open({str(ready)!r}, "w") as file: file.write("{{}}")
time.sleep(60)
"""
    argv = [sys.executable, "-I", "-S", "-c", code]
    rig.add(Spec("worker", lambda known: argv, lambda: {} if ready.exists() else None,
                 forget=lambda: ready.unlink(missing_ok=True)))  # fmt: skip
    supervisor = rig.supervise()
    drive(supervisor, lambda: supervisor.all_ready)
    worker = supervisor.services["worker"]
    broken.touch()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    drive(supervisor, lambda: worker.restarts == 2)
    assert supervisor.failed is None
    broken.unlink()
    drive(supervisor, lambda: supervisor.all_ready)
    supervisor.stop()


def test_stop_goes_in_reverse_order_and_one_at_a_time(rig: Rig) -> None:
    rig.fake("store")
    rig.fake("scheduler", "", "store")
    rig.fake("gateway", "", "scheduler")
    supervisor = rig.supervise()
    drive(supervisor, lambda: supervisor.all_ready)
    changes = rig.changes
    supervisor.stop()
    assert rig.names("stop") == ["gateway", "scheduler", "store"]
    assert rig.alive() == []
    assert {service.state for service in rig.services} == {State.STOPPED}
    assert rig.changes == changes + 3
    supervisor.stop()  # nothing left to do
    assert rig.names("stop") == ["gateway", "scheduler", "store"]


def test_a_service_that_ignores_sigterm_is_killed_and_the_others_end_in_order(rig: Rig) -> None:
    rig.fake("store")
    rig.fake("scheduler", "stubborn", "store")
    supervisor = rig.supervise(stop_s=1.0)
    drive(supervisor, lambda: supervisor.all_ready)
    began = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - began >= 1.0  # it had its time
    assert rig.names("stop") == ["scheduler", "store"]
    assert rig.alive() == []
    assert supervisor.services["scheduler"].state is State.STOPPED


def test_a_second_ctrl_c_kills_at_once(rig: Rig) -> None:
    rig.fake("scheduler", "stubborn")
    supervisor = rig.supervise(stop_s=60.0)
    drive(supervisor, lambda: supervisor.all_ready)
    began = time.monotonic()
    supervisor.stop(hurry=lambda: time.monotonic() > began + 0.2)
    assert time.monotonic() - began < 30
    assert rig.alive() == []


def test_stop_ends_all_even_if_nobody_can_be_told(rig: Rig) -> None:
    rig.fake("store")
    rig.fake("scheduler", "", "store")
    full = False

    def changed() -> None:
        if full:
            raise OSError(28, "No space left on device")

    supervisor = Supervisor(rig.services, changed)
    drive(supervisor, lambda: supervisor.all_ready)
    full = True
    supervisor.stop()
    assert rig.names("stop") == ["scheduler", "store"]
    assert rig.alive() == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children only on Linux")
def test_kill_9_of_the_supervising_process_leaves_no_child(tmp_path: Path) -> None:
    script = f"""
import importlib.util, pathlib
spec = importlib.util.spec_from_file_location("rig", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
rig = module.Rig(pathlib.Path({str(tmp_path)!r}))
rig.fake("store")
rig.fake("scheduler", "", "store")
rig.supervise().run_until(lambda: False)
"""
    log = tmp_path / "supervisor.log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", script], stderr=output)
    rig = Rig(tmp_path)
    try:
        _await(lambda: (tmp_path / "scheduler.ready").exists() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        assert rig.alive() == ["store", "scheduler"]
        process.kill()
        process.wait(timeout=10)
        _await(lambda: not _running(rig))
    finally:
        process.kill()
        process.wait(timeout=10)
        for pid in _running(rig):
            os.kill(pid, signal.SIGKILL)
    assert sorted(rig.names("stop")) == ["scheduler", "store"]  # asked to end, not cut off


def _running(rig: Rig) -> list[int]:
    """Children that are not even zombies (nobody may be there to reap them)."""
    found = []
    for _, pid, _ in rig.journal("start"):
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            continue
    return found


def _await(check: Callable[[], object], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.01)
