"""What a running `up` leaves on disk, and when it is believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastserve.cli.errors import CliError
from fastserve.cli.state import StateFolder, default_folder, process_of, tail

_URL = "http://127.0.0.1:8000"


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path / "state")


def _put(folder: StateFolder, **state: Any) -> None:
    (folder.folder / "state.json").write_text(json.dumps(state))


def test_a_second_lock_is_refused_and_says_where_the_first_is(folder: StateFolder) -> None:
    folder.lock()
    folder.write({"url": _URL})
    with pytest.raises(CliError) as refused:
        StateFolder(folder.folder).lock()
    assert _URL in str(refused.value)
    for hint in ("fastserve down", "--state-dir", "--port"):
        assert hint in str(refused.value)
    folder.unlock()


def test_a_second_lock_is_refused_before_the_first_has_said_where_it_is(
    folder: StateFolder,
) -> None:
    folder.lock()
    with pytest.raises(CliError, match="up already"):
        StateFolder(folder.folder).lock()
    folder.unlock()


def test_a_refused_lock_leaves_the_state_of_the_first(folder: StateFolder) -> None:
    folder.lock()
    folder.write({"url": _URL})
    second = StateFolder(folder.folder)
    with pytest.raises(CliError):
        second.lock()
    state = second.read()
    assert state is not None and state["url"] == _URL
    folder.unlock()


def test_folders_do_not_disturb_each_other(folder: StateFolder, tmp_path: Path) -> None:
    other = StateFolder(tmp_path / "other")
    folder.lock()
    other.lock()
    other.unlock()
    folder.unlock()


def test_unlock_removes_the_state_and_the_lock_can_be_had_again(folder: StateFolder) -> None:
    folder.lock()
    folder.write({"url": _URL})
    folder.unlock()
    assert folder.read() is None
    assert not (folder.folder / "state.json").exists()
    again = StateFolder(folder.folder)
    again.lock()
    again.unlock()
    again.unlock()  # twice does no harm


def test_the_lock_falls_with_its_process(folder: StateFolder) -> None:
    code = f"""
import os, signal
from pathlib import Path
from fastserve.cli.state import StateFolder
folder = StateFolder(Path({str(folder.folder)!r}))
folder.lock()
folder.write({{"url": {_URL!r}}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, timeout=30)
    assert result.returncode == -9
    assert (folder.folder / "state.json").exists()  # nobody tidied up
    assert folder.read() is None
    folder.lock()
    folder.unlock()


def test_a_child_does_not_hold_the_lock(folder: StateFolder) -> None:
    folder.lock()
    code = "print('here', flush=True); input()"
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe,
                             close_fds=False)  # fmt: skip
    try:
        assert child.stdout is not None and child.stdout.readline() == b"here\n"
        folder.unlock()
        folder.lock()
        folder.unlock()
    finally:
        child.kill()
        child.communicate(timeout=10)


def test_what_is_written_is_read_with_the_process_that_wrote_it(folder: StateFolder) -> None:
    folder.write({"url": _URL, "ready": False})
    state = folder.read()
    assert state is not None
    assert (state["url"], state["ready"], state["pid"]) == (_URL, False, os.getpid())
    assert process_of(state) == psutil.Process()


def test_state_of_a_dead_process_does_not_count(folder: StateFolder) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE,
                             stderr=subprocess.DEVNULL)  # fmt: skip
    _put(folder, url=_URL, pid=child.pid, started=psutil.Process(child.pid).create_time())
    assert folder.read() is not None
    child.kill()
    child.communicate(timeout=10)
    assert folder.read() is None


def test_state_of_a_zombie_does_not_count(folder: StateFolder) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(child.pid)
    _put(folder, url=_URL, pid=child.pid, started=process.create_time())
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended; nobody reaped it
    assert process.status() == psutil.STATUS_ZOMBIE
    assert folder.read() is None
    child.wait(timeout=10)


def test_state_of_a_pid_that_is_another_process_by_now_does_not_count(folder: StateFolder) -> None:
    started = psutil.Process().create_time()
    _put(folder, url=_URL, pid=os.getpid(), started=started - 60.0)
    assert folder.read() is None
    _put(folder, url=_URL, pid=os.getpid(), started=started)
    assert folder.read() is not None


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "{}", '{"pid": "x", "started": 1}'])
def test_a_state_file_that_makes_no_sense_does_not_count(folder: StateFolder, content: str) -> None:
    (folder.folder / "state.json").write_text(content)
    assert folder.read() is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(CliError, match="cannot use the state folder") as refused:
        StateFolder(taken / "state")
    assert str(taken / "state") in str(refused.value)


def test_a_lock_that_cannot_be_opened_is_named(folder: StateFolder) -> None:
    (folder.folder / "lock").mkdir()
    with pytest.raises(CliError, match="cannot use the state folder") as refused:
        folder.lock()
    assert str(folder.folder) in str(refused.value)


def test_where_state_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASTSERVE_STATE_DIR", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".local" / "state" / "fastserve"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "fastserve"
    monkeypatch.setenv("FASTSERVE_STATE_DIR", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    assert tail(log, 3) == []
    log.write_bytes(b"one\ntwo\n\xff three\nfour\n")
    assert tail(log, 2) == ["\ufffd three", "four"]
    assert len(tail(log, 10)) == 4
