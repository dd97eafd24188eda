"""Starts the ranks of a group on this host, and ends them all with the first that ends."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import sys

import structlog

from fastserve.common.errors import StartupError
from fastserve.common.processes import ending

log = structlog.get_logger(__name__)
_PR_SET_PDEATHSIG = 1


def held_port() -> socket.socket:
    """A free port for rank 0, which listens seconds later; until then the system gives it to no
    connection and no other server."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # rank 0 does the same
    held.bind(("127.0.0.1", 0))
    return held


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


async def launch(size: int, stop: asyncio.Event) -> None:
    """Run `size` ranks of this very command until `stop`, then end them in order through rank 0.

    Raises `StartupError` when one ends by itself; the others are killed first.
    """
    held = held_port()
    common = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(held.getsockname()[1]),
    }
    ranks = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fastserve.worker", *sys.argv[1:]),
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=_die_with_parent,
        )
        for rank in range(size)
    ]
    log.info("ranks started", pids=[process.pid for process in ranks])
    ends = [asyncio.ensure_future(process.wait()) for process in ranks]
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([stopping, *ends], return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            if ranks[0].returncode is None:
                ranks[0].terminate()
            # One that is lost now ends the others by itself (watch.py).
            await asyncio.wait(ends)
            return
        rank = next(rank for rank, end in enumerate(ends) if end.done())
        raise StartupError(f"the group ends: rank {rank} {ending(ends[rank].result())}")
    finally:
        stopping.cancel()
        held.close()
        for process in ranks:
            if process.returncode is None:
                process.kill()
        await asyncio.wait(ends)
