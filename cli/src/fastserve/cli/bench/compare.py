"""`fastserve bench compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastserve.cli.bench.options import (
    OUTPUT,
    WHAT,
    WHEN,
    WHO,
    AsJson,
    Model,
    StartTimeout,
    Timeout,
)


def compare(
    model: Model = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            help="The same weights for llama.cpp (default: the model, if it is a GGUF file).",
            show_default=False,
            rich_help_panel=WHO,
        ),
    ] = None,
    fastserve: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FLAGS",
            help='Flags of `fastserve up`, such as "--dtype bfloat16"; repeat to compare several.',
            show_default=False,
            rich_help_panel=WHO,
        ),
    ] = None,
    vllm: Annotated[
        Path | None,
        typer.Option(
            help="Environment or executable of vLLM (default: on PATH).",
            show_default=False,
            rich_help_panel=WHO,
        ),
    ] = None,
    llama_server: Annotated[
        Path | None,
        typer.Option(
            help="Executable of llama.cpp's server (default: on PATH).",
            show_default=False,
            rich_help_panel=WHO,
        ),
    ] = None,
    llama_types: Annotated[
        list[str] | None,
        typer.Option(
            help="What llama.cpp's weights are quantised to beside the file as it is (default: "
            "Q8_0); needs llama-quantize beside its server; none: nothing.",
            show_default=False,
            rich_help_panel=WHO,
        ),
    ] = None,
    openvino: Annotated[
        Path | None,
        typer.Option(
            help="Environment of OpenVINO GenAI, which gets the files that llama.cpp gets.",
            show_default=False,
            rich_help_panel=WHO,
        ),
    ] = None,
    transformers: Annotated[
        Path | None,
        typer.Option(
            help="Environment or executable of transformers (default: on PATH).",
            show_default=False,
            rich_help_panel=WHO,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Of fastserve,vllm,llama.cpp,openvino,transformers, in this order (default: all).",
            show_default=False,
            rich_help_panel=WHO,
        ),
    ] = None,
    concurrency: Annotated[
        list[str] | None,
        typer.Option(
            "--concurrency",
            "-c",
            help="Requests at a time (default: 1,8,32, or none with --rate).",
            show_default=False,
            rich_help_panel=WHEN,
        ),
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(
            "--rate",
            "-r",
            help="Requests per second, on schedule.",
            show_default=False,
            rich_help_panel=WHEN,
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            "-n",
            min=1,
            help="Of a run (default: two per request at a time, at least 4; 64 at a rate).",
            show_default=False,
            rich_help_panel=WHEN,
        ),
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(min=1, help="Runs of each kind; the best counts.", rich_help_panel=WHEN),
    ] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, rich_help_panel=WHAT)] = 44,
    output_tokens: Annotated[int, typer.Option(min=1, rich_help_panel=WHAT)] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts.", rich_help_panel=WHAT)] = 0,
    start_timeout: StartTimeout = 300.0,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for compare.csv and plots.", show_default=False, rich_help_panel=OUTPUT
        ),
    ] = None,
) -> None:
    """Measure FastServe and other servers one after the other: same weights, same requests.

    Starts FastServe, vLLM, llama.cpp's server, OpenVINO GenAI and `transformers serve`, each with
    the settings that it is fastest with on this machine, and skips what is not installed. Examples:

        fastserve bench compare --llama-server ~/llama.cpp/build/bin/llama-server

        fastserve bench compare --vllm ~/vllm-env --only fastserve,vllm -c 1,8,32 --out results

        fastserve bench compare --fastserve "--policy fcfs" --fastserve "--policy fastserve" -r 1,2

    On a busy machine the figures mean nothing.
    """
    from fastserve.bench.compare.command import Asked, run

    run(
        Asked(
            model=model,
            gguf=gguf,
            fastserve=fastserve or [],
            vllm=vllm,
            llama_server=llama_server,
            llama_types=[kind for kind in (llama_types or ["Q8_0"]) if kind != "none"],
            openvino=openvino,
            transformers=transformers,
            only=only or [],
            concurrency=concurrency or ([] if rate else ["1,8,32"]),
            rates=rate or [],
            requests=requests,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            seed=seed,
            repeat=repeat,
            start_timeout=start_timeout,
            timeout=timeout,
            as_json=as_json,
            out=out,
        )
    )
