"""Services on their way up: a live table on a terminal, a line per change elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fastserve.cli.service import State

_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_STYLE = {State.READY: "green", State.FAILED: "red", State.RESTARTING: "yellow"}
_TEXT = {("model", State.STARTING): "checking and converting (30 s the first time)"}


class Progress:
    """Shows the services as the state file describes them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._services: dict[str, dict[str, Any]] = {}
        self._since: dict[str, tuple[str, float]] = {}
        # Drawn by `tick` alone: a drawing thread would be in the way of forking children.
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        if self._live is not None:
            self._live.start()

    def update(self, services: dict[str, dict[str, Any]]) -> None:
        now = time.monotonic()
        for name, service in services.items():
            state = service["state"]
            if self._since.get(name, ("",))[0] == state:
                continue
            self._since[name] = (state, now)
            if self._live is None and state != State.WAITING:
                self._console.print(f"{name:<11} {_describe(name, service)}", highlight=False)
        self._services = services
        self.tick()

    def tick(self) -> None:
        """Draw again, so that seconds and spinner move."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def close(self) -> None:
        """Leave what was drawn; later changes come as lines."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        now = time.monotonic()
        turn = _SPINNER[int(now * 10) % len(_SPINNER)]
        for name, service in self._services.items():
            state = service["state"]
            text = _describe(name, service)
            mark = {State.READY: "✓", State.FAILED: "✗", State.STARTING: turn}.get(state, " ")
            if state == State.STARTING:
                text += f" {now - self._since[name][1]:.0f} s"
            table.add_row(mark, name, text, style=_STYLE.get(state, ""))
        return table


def _describe(name: str, service: dict[str, Any]) -> str:
    state = service["state"]
    if state == State.READY:
        return f"ready ({service['seconds']:.1f} s)"
    if state == State.RESTARTING:
        return f"{state}: it {service['ended']}"
    return _TEXT.get((name, State(state)), str(state))
