"""`fastserve bench perplexity`."""

from __future__ import annotations

import typer

from fastserve.cli.bench.worker import run_module


def perplexity(context: typer.Context) -> None:
    """What the number formats cost in quality (--help for options)."""
    run_module("perplexity", context)
