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

log = structlog.get_logger(__name__)
_PR_SET_PDEATHSIG = 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


async def launch(size: int, stop: asyncio.Event) -> None:
    """Run `size` ranks of this very command until `stop`, then end them in order through rank 0.

    Raises `StartupError` when one ends by itself; the others are killed first.
    """
    common = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
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
        raise StartupError(f"rank {rank} ended with status {ends[rank].result()}: the group ends")
    finally:
        stopping.cancel()
        for process in ranks:
            if process.returncode is None:
                process.kill()
        await asyncio.wait(ends)
