"""`fastserve bench`: measurements. What takes time to import is imported in the commands."""

from __future__ import annotations

import typer

from fastserve.bench.cli import OneSentence
from fastserve.cli.bench.compare import compare
from fastserve.cli.bench.engine import engine
from fastserve.cli.bench.memory import memory
from fastserve.cli.bench.perplexity import perplexity
from fastserve.cli.bench.serve import serve
from fastserve.cli.bench.worker import PASS_ON

app = typer.Typer(
    no_args_is_help=True,
    help="Measure a server, or several servers side by side.",
)
app.command(cls=OneSentence)(serve)
app.command(cls=OneSentence)(compare)
app.command(cls=OneSentence)(memory)
app.command(context_settings=PASS_ON)(engine)
app.command(context_settings=PASS_ON)(perplexity)
