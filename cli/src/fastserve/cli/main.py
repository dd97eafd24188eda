"""The `fastserve` command."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version as version_of
from typing import Annotated

import typer
from rich.console import Console

from fastserve.bench.cli import OneSentence, simulate
from fastserve.cli import bench
from fastserve.cli.errors import CliError
from fastserve.cli.options import StateDir, TlsCa, TlsCert, TlsKey, TlsServerName, folder
from fastserve.cli.up_command import up

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
app.command()(up)


@app.command()
def down(
    state_dir: StateDir = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the end.", min=1)] = 60.0,
) -> None:
    """Stop a running `fastserve up`, answers under way first."""
    from fastserve.cli.up import down

    typer.echo(down(folder(state_dir), timeout))


@app.command()
def status(
    state_dir: StateDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the services, their state and the queue. Exit status 3 if nothing runs."""
    from fastserve.cli.status import collect, show

    found = collect(folder(state_dir))
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
    sources = named or local_sources(folder(state_dir), found)
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

    named = addresses(scheduler or [], folder(state_dir))
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

    running = folder(state_dir).read() if url is None else None
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
    path = folder(state_dir).log(service)
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
