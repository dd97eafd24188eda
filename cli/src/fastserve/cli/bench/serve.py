"""`fastserve bench serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastserve.cli.bench.options import HOW, OUTPUT, WHAT, WHEN, AsJson
from fastserve.cli.state import StateFolder, default_folder


def serve(
    url: Annotated[
        str | None,
        typer.Argument(
            help="Server with OpenAI's API (default: the one that runs here).", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model (default: the server's first).", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="FASTSERVE_BENCH_KEY", show_default=False)
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            "--workload",
            "-w",
            help="Lengths: sharegpt (default), alpaca, azure-conv, azure-code, longtail, or a "
            "mixture such as azure-code+alpaca.",
            show_default=False,
            rich_help_panel=WHAT,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the columns arrival_s,prompt_tokens,output_tokens, instead.",
            show_default=False,
            rich_help_panel=WHAT,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with the field prompt, perhaps output_tokens: real texts instead of "
            "made ones.",
            show_default=False,
            rich_help_panel=WHAT,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The same length for all.", rich_help_panel=WHAT),
    ] = None,
    output_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The same max_tokens for all.", rich_help_panel=WHAT),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder with tokenizer.json to make prompts with (default: the server's "
            "/tokenize).",
            show_default=False,
            rich_help_panel=WHAT,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of lengths, prompts and arrivals.", rich_help_panel=WHAT)
    ] = 0,
    rate: Annotated[
        list[str] | None,
        typer.Option(
            "--rate",
            "-r",
            help="Requests per second (default: 1, or as recorded); several make a sweep: 1,2,4.",
            show_default=False,
            rich_help_panel=WHEN,
        ),
    ] = None,
    concurrency: Annotated[
        list[str] | None,
        typer.Option(
            "--concurrency",
            "-c",
            help="So many clients with one request at a time each, instead of a rate: 1,8,32.",
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
            help="Requests of a run (default: 200; with its arrivals, those of the trace).",
            show_default=False,
            rich_help_panel=WHEN,
        ),
    ] = None,
    arrivals: Annotated[
        str,
        typer.Option(
            help="poisson, gamma (see --cv) or trace (as recorded; stretched to --rate if given).",
            rich_help_panel=WHEN,
        ),
    ] = "poisson",
    cv: Annotated[
        float,
        typer.Option(
            help="Standard deviation over mean of gamma gaps: more is bursty.",
            rich_help_panel=WHEN,
        ),
    ] = 1.0,
    warmup: Annotated[
        int,
        typer.Option(min=0, help="Requests before that do not count.", rich_help_panel=WHEN),
    ] = 1,
    endpoint: Annotated[
        str, typer.Option(help="completions or chat.", rich_help_panel=HOW)
    ] = "completions",
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Answers of the full length.", rich_help_panel=HOW),
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0: greedy.", rich_help_panel=HOW)
    ] = 0.0,
    extra_body: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Further fields of every body.",
            show_default=False,
            rich_help_panel=HOW,
        ),
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(
            "--header",
            "-H",
            metavar="NAME: VALUE",
            help="Of every request; repeat for more.",
            show_default=False,
            rich_help_panel=HOW,
        ),
    ] = None,
    service_class: Annotated[
        str | None,
        typer.Option(
            help="Header x-fastserve-class of every request.",
            show_default=False,
            rich_help_panel=HOW,
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(
            help="Header x-fastserve-tenant of every request.",
            show_default=False,
            rich_help_panel=HOW,
        ),
    ] = None,
    tenants: Annotated[
        int, typer.Option(min=1, help="Spread over so many tenants.", rich_help_panel=HOW)
    ] = 1,
    tenant_skew: Annotated[
        float,
        typer.Option(help="Tenant k sends in proportion to 1 / k^SKEW.", rich_help_panel=HOW),
    ] = 0.0,
    timeout: Annotated[
        float,
        typer.Option(help="Seconds after which a request has failed.", rich_help_panel=HOW),
    ] = 600.0,
    slo_ttft: Annotated[
        float | None,
        typer.Option(
            help="Seconds to the first token: counts towards goodput.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    slo_tpot: Annotated[
        float | None,
        typer.Option(
            help="Seconds per token after the first, likewise.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: AsJson = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for runs.csv, load.png and load.svg.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Load a server with OpenAI's API and report latency, throughput and goodput.

    Requests leave on schedule, whatever became of those before, and latency counts from the moment
    they were due. Rates make a sweep:

        fastserve bench serve --workload sharegpt --rate 1,2,4 --slo-ttft 1 --out results

        fastserve bench serve http://host:8000 --prompts prompts.jsonl --endpoint chat --rate 2

        fastserve bench serve --trace my.csv --arrivals trace

    So many clients at a time, lengths fixed:

        fastserve bench serve -c 1,8,32 -n 64 --prompt-tokens 44 --output-tokens 128 --ignore-eos

    A request that fails counts with the worst latency of its run and misses every SLO. Ctrl-C
    reports what was measured until then.
    """
    from fastserve.bench.load.command import run
    from fastserve.bench.load.options import Asked

    run(
        Asked(
            url=url or _running_here(),
            model=model,
            api_key=api_key,
            endpoint=endpoint,
            workload=workload,
            trace=trace,
            prompts=prompts,
            tokenizer=tokenizer,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            arrivals=arrivals,
            cv=cv,
            rates=rate or [],
            concurrency=concurrency or [],
            requests=requests,
            seed=seed,
            tenants=tenants,
            tenant_skew=tenant_skew,
            service_class=service_class,
            tenant=tenant,
            headers=header or [],
            extra_body=extra_body,
            temperature=temperature,
            ignore_eos=ignore_eos,
            timeout=timeout,
            warmup=warmup,
            slo_ttft=slo_ttft,
            slo_tpot=slo_tpot,
            as_json=as_json,
            out=out,
        )
    )


def _running_here() -> str:
    """URL of the `fastserve up` of this machine, or where one would be."""
    running = StateFolder(default_folder()).read()
    return str(running["url"]) if running else "http://127.0.0.1:8000"
