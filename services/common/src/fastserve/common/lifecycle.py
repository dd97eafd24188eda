"""The life of a service process: start, announce readiness, stop on SIGTERM, exit status."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable

import structlog
import uvloop

from fastserve.common.errors import FastServeError
from fastserve.common.files import write_json
from fastserve.common.settings import ServiceSettings, SettingsT, load_settings
from fastserve.common.telemetry import configure_logging, configure_tracing

log = structlog.get_logger(__name__)


def run_service(
    name: str,
    settings_cls: type[SettingsT],
    main: Callable[[SettingsT, asyncio.Event], Awaitable[None]],
) -> int:
    """Load settings, set up telemetry, run `main(settings, stop)` on uvloop; the exit status.

    `stop` is set by SIGTERM or SIGINT; `main` then ends its work and returns. A `FastServeError`
    ends the process with status 2 and its message as one line on stderr.
    """
    try:
        settings = load_settings(settings_cls, f"fastserve-{name}")
        configure_logging(name, settings.log_level)
    except (FastServeError, ValueError) as error:
        print(f"fastserve-{name}: {error}", file=sys.stderr)
        return 2
    provider = configure_tracing(name)
    log.info("starting", settings=settings.effective(), pid=os.getpid())
    try:
        uvloop.run(_supervise(settings, main))
    except FastServeError as error:
        log.error("cannot go on", reason=str(error))
        print(f"fastserve-{name}: {error}", file=sys.stderr)
        return 2
    finally:
        if provider is not None:
            provider.shutdown()
    log.info("stopped")
    return 0


async def _supervise(
    settings: SettingsT, main: Callable[[SettingsT, asyncio.Event], Awaitable[None]]
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await main(settings, stop)


def announce_ready(settings: ServiceSettings, **info: str | int) -> None:
    """Log that the service is ready and write the ready file (atomically) if one is asked for."""
    log.info("ready", **info)
    if settings.ready_file is not None:
        write_json(settings.ready_file, {"pid": os.getpid(), **info})
