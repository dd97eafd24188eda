"""The `fastserve` command."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastserve.bench.cli import OneSentence, simulate
from fastserve.cli import bench
from fastserve.cli.errors import CliError
from fastserve.cli.stack import Options
from fastserve.cli.state import StateFolder, default_folder

_NOT_RUNNING = 3  # exit status of `status`, as with service managers

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""FastServe: LLM serving with iteration-level preemption.

Start everything on this machine with `fastserve up`, talk to it with `fastserve chat`, or point any
OpenAI client at http://127.0.0.1:8000/v1.""",
)

StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        help="Folder for state and logs; one deployment each (default: ~/.local/state/fastserve).",
        show_default=False,
    ),
]
_TLS = "Mutual TLS, as of the services"
TlsCert = Annotated[
    Path | None,
    typer.Option(help="Certificate (PEM; or FASTSERVE_TLS_CERT).", rich_help_panel=_TLS),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(help="Its private key (PEM; or FASTSERVE_TLS_KEY).", rich_help_panel=_TLS),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(help="Authority of all (PEM; or FASTSERVE_TLS_CA).", rich_help_panel=_TLS),
]
TlsServerName = Annotated[
    str | None,
    typer.Option(
        help="Name in their certificates (or FASTSERVE_TLS_SERVER_NAME; default: the host).",
        rich_help_panel=_TLS,
    ),
]
_ORDER = "Scheduling"
_SIZES = "Sizes and limits"
_PLACES = "Where"


def _folder(state_dir: Path | None) -> StateFolder:
    return StateFolder(state_dir or default_folder())


@app.command()
def up(
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return once it is ready; it runs on.")
    ] = False,
    demo: Annotated[bool, typer.Option("--demo", help="Stream one answer when ready.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Hugging Face folder or .gguf file (default: SmolLM2-135M-Instruct)."),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model in requests.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="skip-join-mlfq, fastserve, mlfq, fixed-priority, hrrn, fcfs or srpt.",
            rich_help_panel=_ORDER,
        ),
    ] = None,
    fair_sharing: Annotated[
        bool | None,
        typer.Option(
            "--fair-sharing/--no-fair-sharing",
            help="Share service between the tenants of a class.",
            show_default=False,
            rich_help_panel=_ORDER,
        ),
    ] = None,
    quantum: Annotated[
        float | None,
        typer.Option(
            help="Seconds of service in the first level (default: measured).",
            rich_help_panel=_ORDER,
        ),
    ] = None,
    starvation_threshold: Annotated[
        float | None,
        typer.Option(
            help="Seconds a job waits before it is lifted; inf: never.", rich_help_panel=_ORDER
        ),
    ] = None,
    prefix_cache: Annotated[
        str | None,
        typer.Option(
            help="Who shares KV of equal beginnings: off, tenant or all.", rich_help_panel=_ORDER
        ),
    ] = None,
    kv_strategy: Annotated[
        str | None,
        typer.Option(help="proactive, reactive, recompute or defer.", rich_help_panel=_ORDER),
    ] = None,
    kv_write_through: Annotated[
        bool | None,
        typer.Option(
            "--kv-write-through/--no-kv-write-through",
            help="Copy full KV blocks to the host ahead of need.",
            show_default=False,
            rich_help_panel=_ORDER,
        ),
    ] = None,
    max_num_partial_prefills: Annotated[
        int | None,
        typer.Option(
            help="Prompts of several iterations under way at once.", rich_help_panel=_ORDER
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Key that requests must carry; repeat for more.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with keys, one a line, each with what it grants if that is limited: "
            "KEY tenant=NAME class=NAME weight=NUMBER."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on.", rich_help_panel=_PLACES)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port (0: any free one).", min=0, max=65535, rich_help_panel=_PLACES)
    ] = 8000,
    redis_url: Annotated[
        str | None,
        typer.Option(help="A Redis or Valkey server (default: embedded).", rich_help_panel=_PLACES),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_PLACES)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_PLACES),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Of weights: none or int8 (CPU).", rich_help_panel=_PLACES)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the worker.", rich_help_panel=_PLACES)
    ] = None,
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option(help="Ranks that share every layer.", min=1, rich_help_panel=_PLACES),
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None,
        typer.Option(help="Stages of layers, in turn.", min=1, rich_help_panel=_PLACES),
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Most jobs in an iteration.", rich_help_panel=_SIZES)
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Most tokens in an iteration.", rich_help_panel=_SIZES)
    ] = None,
    max_num_queued_reqs: Annotated[
        int | None, typer.Option(help="Waiting jobs before 429.", rich_help_panel=_SIZES)
    ] = None,
    scheduler_replicas: Annotated[
        int,
        typer.Option(
            help="Schedulers: one leads, the others stand by.", min=1, rich_help_panel=_SIZES
        ),
    ] = 1,
    max_model_len: Annotated[
        int | None, typer.Option(help="Most tokens of a request.", rich_help_panel=_SIZES)
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens in a KV block.", rich_help_panel=_SIZES)
    ] = None,
    kv_blocks: Annotated[
        int | None, typer.Option(help="KV blocks on the device.", rich_help_panel=_SIZES)
    ] = None,
    host_kv_blocks: Annotated[
        int | None,
        typer.Option(help="KV blocks in host memory (instead of size).", rich_help_panel=_SIZES),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(help="Host memory for KV, such as 2G.", rich_help_panel=_SIZES),
    ] = None,
    disk_path: Annotated[
        Path | None,
        typer.Option(help="Folder for KV that host memory cannot hold.", rich_help_panel=_SIZES),
    ] = None,
    disk_size: Annotated[
        str | None,
        typer.Option(help="How much of it to use, such as 20G.", rich_help_panel=_SIZES),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    state_dir: StateDir = None,
) -> None:
    """Start Valkey, kv-offload, worker, scheduler and gateway on this machine.

    Stays in the foreground until Ctrl-C, which stops all of it. Examples:

        fastserve up --demo

        fastserve up --detach --model ./Qwen3-0.6B --port 9000

        fastserve up --policy fcfs --max-num-seqs 4 --kv-blocks 64

    Without --policy, --max-num-seqs and so on, the defaults of the services hold (also:
    FASTSERVE_MAX_NUM_SEQS and the like in the environment, for every option of every service).
    """
    from fastserve.cli.up import detached, foreground

    options = Options(
        model=model,
        served_model_name=served_model_name,
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        api_key_file=api_key_file,
        policy=policy,
        fair_sharing=fair_sharing,
        quantum=quantum,
        prefix_cache=prefix_cache,
        kv_strategy=kv_strategy,
        kv_write_through=kv_write_through,
        max_num_partial_prefills=max_num_partial_prefills,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_queued_reqs=max_num_queued_reqs,
        starvation_threshold=starvation_threshold,
        scheduler_replicas=scheduler_replicas,
        max_model_len=max_model_len,
        block_size=block_size,
        kv_blocks=kv_blocks,
        host_kv_blocks=host_kv_blocks,
        host_memory=host_memory,
        disk_path=disk_path,
        disk_size=disk_size,
        device=device,
        dtype=dtype,
        quantization=quantization,
        threads=threads,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        redis_url=redis_url,
        log_level=log_level,
    )
    folder = _folder(state_dir)
    if not detach:
        foreground(options, folder, demo=demo)
        return
    arguments = [word for word in sys.argv[2:] if word not in ("--detach", "-d")]
    detached(arguments, options, folder)


@app.command()
def down(
    state_dir: StateDir = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the end.", min=1)] = 60.0,
) -> None:
    """Stop a running `fastserve up`, answers under way first."""
    from fastserve.cli.up import down

    typer.echo(down(_folder(state_dir), timeout))


@app.command()
def status(
    state_dir: StateDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the services, their state and the queue. Exit status 3 if nothing runs."""
    from fastserve.cli.status import collect, show

    found = collect(_folder(state_dir))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found, Console())
    if not found["running"]:
        raise typer.Exit(_NOT_RUNNING)


@app.command()
def top(
    scheduler: Annotated[
        list[str] | None,
        typer.Option(help="gRPC address of a scheduler; repeat for shards and standbys."),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="URL of a kv-offload sidecar's metrics, for its tiers; repeat for more."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one view and exit.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two views.", min=0.1)] = 1.0,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
    tls_server_name: TlsServerName = None,
    state_dir: StateDir = None,
) -> None:
    """Watch queues, jobs that move between levels, KV tiers and workers; q ends it.

    Of what runs on this machine, or of --scheduler. Without a terminal it prints one view.
    """
    from fastserve.cli.schedulers import tls
    from fastserve.cli.top import Sources, local_sources, run

    found = tls(tls_cert, tls_key, tls_ca, tls_server_name)
    named = Sources(scheduler, metrics or [], found) if scheduler else None
    sources = named or local_sources(_folder(state_dir), found)
    run(sources, Console(), once=once, interval_s=interval)


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="Id of the worker group, as in --worker-id.")],
    scheduler: Annotated[
        list[str] | None,
        typer.Option(help="gRPC address of a scheduler; repeat for more (default: those here)."),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Let it take new jobs again.")] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait until no job is left (0: do not).", min=0)
    ] = 60.0,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
    tls_server_name: TlsServerName = None,
    state_dir: StateDir = None,
) -> None:
    """Take the jobs of a worker group away, before it is stopped. It gets no new ones.

    Its running answers go on at other groups; without any they end where they are. Stopping a
    worker (SIGTERM) does the same by itself.
    """
    from fastserve.cli import drain as draining
    from fastserve.cli.schedulers import addresses, tls

    named = addresses(scheduler or [], _folder(state_dir))
    found = tls(tls_cert, tls_key, tls_ca, tls_server_name)
    typer.echo(draining.drain(worker, named, found, undo=undo, wait_s=timeout))


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="Ask this and exit.")] = None,
    url: Annotated[
        str | None, typer.Option(help="Server (default: the one that runs here).")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="FASTSERVE_CHAT_KEY")] = None,
    model: Annotated[str | None, typer.Option(help="Model (default: the server's first).")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0)] = None,
    state_dir: StateDir = None,
) -> None:
    """Talk to the model; the answer streams. Without PROMPT: a conversation, until Ctrl-D."""
    from fastserve.cli.chat import Chat, print_answer

    running = _folder(state_dir).read() if url is None else None
    where = url or (running["url"] if running else "http://127.0.0.1:8000")
    with Chat(where.rstrip("/").removesuffix("/v1"), api_key, model, system) as talk:
        if prompt is not None:
            print_answer(talk.ask(prompt, max_tokens=max_tokens, temperature=temperature))
            return
        while True:
            try:
                text = input("> ")
            except EOFError:
                typer.echo()
                return
            if text.strip():
                print_answer(talk.ask(text, max_tokens=max_tokens, temperature=temperature))


@app.command()
def logs(
    service: Annotated[
        str, typer.Argument(help="valkey, kv-offload, model, worker, scheduler, gateway or up.")
    ] = "gateway",
    lines: Annotated[int, typer.Option("--lines", "-n", min=1)] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Show the log of a service."""
    path = _folder(state_dir).log(service)
    if not path.is_file():
        known = ", ".join(sorted(log.stem for log in path.parent.glob("*.log"))) or "none"
        raise CliError(f"there is no log of {service!r} (there are: {known})")
    with path.open(errors="replace") as log:
        typer.echo("".join(log.readlines()[-lines:]), nl=False)
        while follow:
            text = log.read()
            typer.echo(text, nl=False)
            if not text:
                time.sleep(0.2)


app.command(cls=OneSentence)(simulate)
app.add_typer(bench.app, name="bench")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"fastserve {version_of('fastserve-cli')}")


def run() -> None:
    """Entry point: errors become one message and exit status 1."""
    try:
        app()
    except CliError as error:
        typer.secho(str(error), err=True, fg="red")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
