"""`fastserve bench`: measurements. What needs the model runs in a process of the worker's package,
since nothing else may import PyTorch; it takes the options and prints the help itself."""

from __future__ import annotations

import subprocess
import sys

import typer

app = typer.Typer(no_args_is_help=True, help="Measure speed and quality on this machine.")
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASS_ON)
def engine(context: typer.Context) -> None:
    """Steps of the model against the limits of memory and arithmetic (--help for options)."""
    _run("fastserve.worker.bench.engine", context.args)


@app.command(context_settings=_PASS_ON)
def perplexity(context: typer.Context) -> None:
    """What the number formats cost in quality (--help for options)."""
    _run("fastserve.worker.bench.perplexity", context.args)


def _run(module: str, arguments: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    raise typer.Exit(result.returncode)
