"""What several commands of `fastserve bench` ask for, and the panels of their `--help`."""

from __future__ import annotations

from typing import Annotated, Final

import typer

WHO: Final = "Who is compared"
WHAT: Final = "What is sent"
WHEN: Final = "When it is sent"
HOW: Final = "Requests"
OUTPUT: Final = "Output"

Model = Annotated[
    str | None,
    typer.Option(
        help="Hugging Face folder or .gguf file (default: SmolLM2-135M-Instruct).",
        show_default=False,
        rich_help_panel=WHO,
    ),
]
StartTimeout = Annotated[
    float,
    typer.Option(min=1, help="Seconds that a server has to come up.", rich_help_panel=HOW),
]
Timeout = Annotated[
    float,
    typer.Option(min=1, help="Seconds after which a request has failed.", rich_help_panel=HOW),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object per run, a line each.", rich_help_panel=OUTPUT
    ),
]
