"""The process: the streams to the schedulers, the HTTP server, and an orderly end of both."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

import structlog
import uvicorn
from prometheus_client import CollectorRegistry

from fastserve.common.errors import StartupError
from fastserve.common.lifecycle import announce_ready
from fastserve.common.tls import load_tls
from fastserve.gateway.app import create_app
from fastserve.gateway.auth import ApiKeys
from fastserve.gateway.metrics import Metrics
from fastserve.gateway.scheduler_client import SchedulerClient
from fastserve.gateway.settings import GatewaySettings
from fastserve.gateway.shards import Shards
from fastserve.gateway.state import Gateway
from fastserve.gateway.tokenizer import Tokenizer, TokenizerPool

log = structlog.get_logger(__name__)

_BACKLOG: Final = 2048
_LAST_WORDS_S: Final = 2.0  # for errors to reach the clients of answers that are cut off
_POLL_S: Final = 0.02


class _Server(uvicorn.Server):
    """Tells when it is up, and leaves signals to the lifecycle of the service."""

    def __init__(self, config: uvicorn.Config, on_up: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_up = on_up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_up()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Service:
    """One gateway; tests run it in their own process."""

    def __init__(self, settings: GatewaySettings, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer`: that of the model folder, if it is loaded. Raises `StartupError`."""
        self.settings = settings
        self.port = 0
        tls = load_tls(settings)
        self.shards = Shards(
            [
                SchedulerClient(
                    shard,
                    addresses,
                    f"{socket.gethostname()}-{os.getpid()}",
                    answer_timeout_s=settings.scheduler_timeout,
                    reattach_timeout_s=settings.reattach_timeout,
                    tls=tls,
                )
                for shard, addresses in settings.addresses().items()
            ]
        )
        self.gateway = Gateway(
            settings=settings,
            shards=self.shards,
            pool=TokenizerPool(tokenizer or Tokenizer.load(settings.model)),
            metrics=Metrics(CollectorRegistry()),
            keys=ApiKeys(settings.keys()),
        )
        self._socket: socket.socket | None = None

    def listen(self) -> None:
        """Take the port. Raises `StartupError`."""
        host, port = self.settings.host, self.settings.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise StartupError(f"cannot listen on {host}:{port}: {error}") from error
        self.port = self._socket.getsockname()[1]
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Lets the kernel drop what a client that stopped reading never takes (milliseconds).
            timeout_ms = math.ceil(self.settings.send_timeout * 1000)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)

    async def run(self, stop: asyncio.Event, on_up: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`; answers under way then have `shutdown_timeout` seconds to end, and
        whoever comes meanwhile is told to try again."""
        assert self._socket is not None, "listen() comes first"
        grace = self.settings.shutdown_timeout
        server = _Server(
            uvicorn.Config(
                create_app(self.gateway),
                http="httptools",
                ws="none",
                lifespan="off",
                root_path=self.settings.root_path,
                server_header=False,
                access_log=False,
                log_config=None,
                log_level="warning",
                timeout_graceful_shutdown=math.ceil(grace + _LAST_WORDS_S),
            ),
            on_up,
        )
        connecting = asyncio.ensure_future(self.shards.run())
        serving = asyncio.ensure_future(server.serve(sockets=[self._socket]))
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({connecting, serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            log.info("stopping", jobs=self.shards.jobs)
            self.gateway.draining.set()
            end = time.monotonic() + (grace if stop.is_set() else 0)
            while self.shards.jobs and time.monotonic() < end:  # noqa: ASYNC110  # once, at the end
                await asyncio.sleep(_POLL_S)
            server.should_exit = True
            await asyncio.wait({serving}, timeout=max(0.0, end - time.monotonic()))
            if not serving.done():
                log.warning("answers are cut off", jobs=self.shards.jobs)
            await self.shards.close()
            await serving
        finally:
            for task in (connecting, serving, stopping):
                task.cancel()
            ended = await asyncio.gather(connecting, serving, return_exceptions=True)
            self.gateway.pool.close()
        for result in ended:
            if isinstance(result, Exception):
                raise result


async def serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """The whole process, for `run_service`. Raises `StartupError`."""
    service = Service(settings)
    service.listen()
    gc.collect()
    gc.freeze()  # what is here now stays: full collections need not walk it again

    def announce() -> None:
        announce_ready(
            settings,
            address=f"{settings.host}:{service.port}",
            port=service.port,
            metrics_port=service.port,
        )

    await service.run(stop, announce)
