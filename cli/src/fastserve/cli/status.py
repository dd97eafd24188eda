"""`fastserve status`: what runs, where, and how much work waits."""

from __future__ import annotations

from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from fastserve.cli.state import StateFolder

_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "fastserve_durable": "durable",
    "fastserve_leader": "leader",
}


def collect(folder: StateFolder) -> dict[str, Any]:
    """State file and the leading scheduler's gauges in one; {"running": False} if nothing runs."""
    state = folder.read()
    if state is None:
        return {"running": False}
    schedulers = [
        service["metrics"]
        for name, service in state["services"].items()
        if name.startswith("scheduler") and service["metrics"]
    ]
    queues = (_queue(url) for url in schedulers)
    leading = (queue for queue in queues if queue is not None and queue.pop("leader", 0))
    return {"running": True, **state, "queue": next(leading, None)}


def _queue(url: str) -> dict[str, float] | None:
    try:
        text = httpx.get(url, timeout=2.0, trust_env=False).text
    except httpx.HTTPError:
        return None
    found: dict[str, float] = {}
    for line in text.splitlines():
        gauge = _GAUGES.get(line.partition(" ")[0].partition("{")[0])
        if gauge and not line.startswith("#"):
            found[gauge] = float(line.rpartition(" ")[2])
    return found


def show(status: dict[str, Any], console: Console) -> None:
    """For people."""
    if not status["running"]:
        console.print("FastServe is not running. Start it with `fastserve up`.", highlight=False)
        return
    ready = "ready" if status["ready"] else "not ready yet"
    console.print(f"{status['url']}/v1  {status['model']}  {ready}", highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("service", "state", "pid", "restarts", "metrics"):
        table.add_column(column, justify="right" if column in ("pid", "restarts") else "left")
    for name, service in status["services"].items():
        pid, restarts = service["pid"], service["restarts"]
        metrics = service["metrics"] or ""
        table.add_row(name, service["state"], str(pid or ""), str(restarts or ""), metrics)
    console.print(table)
    queue = status["queue"]
    if queue:
        durable = "" if queue.get("durable", 1.0) else ", NOT durable: Redis is away"
        running, waiting = queue.get("running", 0), queue.get("waiting", 0)
        console.print(f"{running:.0f} running, {waiting:.0f} waiting{durable}", highlight=False)
