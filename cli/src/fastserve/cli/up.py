"""`fastserve up`: start everything, say how it goes, keep it running, stop it in order."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import httpx
import psutil
from rich.console import Console

from fastserve.cli import stack
from fastserve.cli.chat import Chat, print_answer
from fastserve.cli.errors import CliError
from fastserve.cli.progress import Progress
from fastserve.cli.service import Service
from fastserve.cli.stack import Options
from fastserve.cli.state import StateFolder, process_of, tail
from fastserve.cli.supervisor import Supervisor

_POLL_S = 0.1
_LOG_LINES = 15
_DEMO_PROMPT = "Explain in two sentences why the sky is blue."


class _Stop:
    """Counts SIGINT and SIGTERM: the first asks for an orderly end, the second for a quick one."""

    def __init__(self) -> None:
        self.count = 0
        self.interrupts = False  # raise KeyboardInterrupt where it happens
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.interrupts:
            raise KeyboardInterrupt

    def asked(self) -> bool:
        return self.count > 0

    def hurried(self) -> bool:
        return self.count > 1


class Deployment:
    """One run of `up` in the foreground."""

    def __init__(self, options: Options, folder: StateFolder, console: Console) -> None:
        self._options, self._folder, self._console = options, folder, console
        self._progress = Progress(console)
        self._run = stack.make_run_folder()
        self._ready = False
        self._env = stack.environment(options)
        services = [
            Service(spec, folder.log(spec.name), self._env)
            for spec in stack.specs(options, self._run)
        ]
        for service in services:
            service.log.write_bytes(b"")  # logs are of this run
        self.supervisor = Supervisor(services, self._changed)

    @property
    def url(self) -> str:
        port = self.supervisor.services["gateway"].ready.get("port", self._options.port)
        return self._options.url.rpartition(":")[0] + f":{port}"

    def run(self, *, demo: bool) -> None:
        """Until a signal. Raises `CliError` if a service does not come up."""
        stop = _Stop()
        self._changed()
        try:
            self._start(stop)
            if stop.asked():
                return
            self._ready = True
            self._changed()
            self._progress.close()
            self._welcome()
            if demo:
                stop.interrupts = True
                try:
                    self._demo()
                except KeyboardInterrupt:
                    self._console.print()  # ends the line of the answer
                except CliError as error:
                    self._console.print(f"no demo: {error}", markup=False)
                stop.interrupts = False
            self.supervisor.run_until(stop.asked)
        finally:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._progress.close()
                self._console.print("stopping ...")
            self.supervisor.stop(hurry=stop.hurried)
            shutil.rmtree(self._run, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._console.print("stopped")

    def _start(self, stop: _Stop) -> None:
        supervisor = self.supervisor

        def done() -> bool:
            self._progress.tick()
            return stop.asked() or supervisor.all_ready or supervisor.failed is not None

        supervisor.run_until(done)
        if supervisor.failed is not None:
            raise CliError(_why(supervisor.failed))
        supervisor.run_until(lambda: stop.asked() or _answers(self.url))

    def _changed(self) -> None:
        services = {
            name: {
                "state": service.state,
                "pid": service.pid,
                "restarts": service.restarts,
                "seconds": service.seconds,
                "ended": service.ended,
                "metrics": _metrics_url(service),
                "address": service.ready.get("address"),
                "log": str(service.log),
            }
            for name, service in self.supervisor.services.items()
        }
        self._folder.write(
            {
                "url": self.url,
                "ready": self._ready,
                "model": self._options.model_name,
                "services": services,
            }
        )
        self._progress.update(services)

    def _welcome(self) -> None:
        services = self.supervisor.services.values()
        say = self._console.print
        say(f"\n[bold]FastServe is up[/bold], serving {self._options.model_name}\n")
        say(f"  API       {self.url}/v1", highlight=False)
        say(f"  API docs  {self.url}/docs", highlight=False)
        say(f"  metrics   {self.url}/metrics", highlight=False)
        for service in services:
            url = _metrics_url(service)
            if url and service.spec.name != "gateway":
                say(f"            {url}  ({service.spec.name})", highlight=False)
        say(f"  logs      {self._folder.logs}", highlight=False)
        say("\nTalk to it with `fastserve chat`. Ctrl-C stops everything.\n", highlight=False)

    def _demo(self) -> None:
        self._console.print(f"[bold]> {_DEMO_PROMPT}[/bold]")
        keys = json.loads(self._env.get(stack.KEYS_VARIABLE) or "[]")
        with Chat(self.url, keys[0] if keys else None, self._options.model_name) as chat:
            print_answer(chat.ask(_DEMO_PROMPT, max_tokens=80, temperature=0.0))
        self._console.print()


def foreground(options: Options, folder: StateFolder, *, demo: bool) -> None:
    """Raises `CliError`."""
    folder.lock()
    try:
        if options.port:
            stack.check_port(options.host, options.port)
        Deployment(options, folder, Console()).run(demo=demo)
    finally:
        folder.unlock()


def detached(arguments: Sequence[str], options: Options, folder: StateFolder) -> None:
    """Start `up` with these arguments in the background; wait until it is ready.

    Raises `CliError` with what it said if it ends before, and KeyboardInterrupt, once it has ended,
    after a signal.
    """
    running = folder.read()
    if running is not None:
        raise CliError(
            f"FastServe is up already at {running['url']}. Stop it with `fastserve down`"
        )
    console = Console()
    progress = Progress(console)
    log = folder.log("up")
    stop = _Stop()  # an exception within Popen would leave a child that nobody knows
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "fastserve.cli", "up", *_without_keys(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=stack.environment(options),
        )
    try:
        state = _await_ready(child, folder, progress, stop)
        if stop.asked():
            child.send_signal(signal.SIGTERM)
            child.wait()
            console.print("stopped")
            raise KeyboardInterrupt
    finally:
        progress.close()
    if state is None:
        raise CliError("\n".join(tail(log, _LOG_LINES)) or "it ended without a word")
    console.print(f"FastServe is up at {state['url']}/v1 (pid {state['pid']})", highlight=False)
    console.print("`fastserve status` looks in, `fastserve down` stops it.", highlight=False)


def _without_keys(arguments: Sequence[str]) -> list[str]:
    """The keys are in the environment, and out of sight of other users."""
    words = iter(arguments)
    kept = []
    for word in words:
        if word == "--api-key":
            next(words, None)
        elif not word.startswith("--api-key="):
            kept.append(word)
    return kept


def _await_ready(
    child: subprocess.Popen[bytes], folder: StateFolder, progress: Progress, stop: _Stop
) -> dict[str, Any] | None:
    """Its state once it is ready; None if it ended, or a signal came."""
    while child.poll() is None and not stop.asked():
        state = folder.read()
        if state is not None and state["pid"] == child.pid:
            progress.update(state["services"])
            if state["ready"]:
                return state
        progress.tick()
        time.sleep(_POLL_S)
    return None


def down(folder: StateFolder, timeout_s: float) -> str:
    """Stop the running `up` and wait for it; what to tell the user. Raises `CliError`."""
    state = folder.read()
    process = process_of(state) if state is not None else None
    if state is None or process is None:
        return "FastServe is not running"
    try:
        process.terminate()
        process.wait(timeout_s)
    except psutil.NoSuchProcess:
        return "stopped"
    except psutil.Error as error:  # it takes too long, or it is not ours
        raise CliError(
            f"process {process.pid} has not ended after {timeout_s:.0f} s: see {folder.log('up')}"
        ) from error
    return "stopped"


def _metrics_url(service: Service) -> str | None:
    port = service.ready.get("metrics_port")
    return f"http://127.0.0.1:{port}/metrics" if port else None


def _why(service: Service) -> str:
    lines = "\n".join(f"  {line}" for line in tail(service.log, _LOG_LINES))
    said = f"Its log ({service.log}) ends with:\n{lines}"
    return f"{service.spec.name} does not start: it {service.ended}. {said}"


def _answers(url: str) -> bool:
    """Whether the gateway has a scheduler that has a worker."""
    try:
        return httpx.get(f"{url}/readyz", timeout=2.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
