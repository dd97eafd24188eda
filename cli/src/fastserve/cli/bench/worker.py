"""Measurements that need PyTorch: processes of the worker's package, which alone may import it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Final

import typer

# The module takes the options and prints the help itself.
PASS_ON: Final[dict[str, Any]] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def run_module(name: str, context: typer.Context) -> None:
    """Run `fastserve.worker.bench.NAME` with the words of the command line; exit as it does."""
    module = f"fastserve.worker.bench.{name}"
    result = subprocess.run([sys.executable, "-m", module, *context.args], check=False)
    raise typer.Exit(result.returncode)
