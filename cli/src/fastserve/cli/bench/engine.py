"""`fastserve bench engine`."""

from __future__ import annotations

import typer

from fastserve.cli.bench.worker import run_module


def engine(context: typer.Context) -> None:
    """Steps of the model against the limits of memory and arithmetic (--help for options)."""
    run_module("engine", context)
