"""`python -m fastserve.cli`: the same as the `fastserve` command."""

from fastserve.cli.main import run

run()
