"""`fastserve bench`: measurements. What takes time to import is imported in the commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastserve.bench.cli import OneSentence
from fastserve.cli.state import StateFolder, default_folder

_WHO = "Who is compared"
_WHAT = "What is sent"
_WHEN = "When it is sent"
_HOW = "Requests"
_OUTPUT = "Output"

app = typer.Typer(
    no_args_is_help=True,
    help="Measure a server, or several servers side by side.",
)


@app.command(cls=OneSentence)
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
            rich_help_panel=_WHAT,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the columns arrival_s,prompt_tokens,output_tokens, instead.",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with the field prompt, perhaps output_tokens: real texts instead of "
            "made ones.",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The same length for all.", rich_help_panel=_WHAT),
    ] = None,
    output_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The same max_tokens for all.", rich_help_panel=_WHAT),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder with tokenizer.json to make prompts with (default: the server's "
            "/tokenize).",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of lengths, prompts and arrivals.", rich_help_panel=_WHAT)
    ] = 0,
    rate: Annotated[
        list[str] | None,
        typer.Option(
            "--rate",
            "-r",
            help="Requests per second (default: 1, or as recorded); several make a sweep: 1,2,4.",
            show_default=False,
            rich_help_panel=_WHEN,
        ),
    ] = None,
    concurrency: Annotated[
        list[str] | None,
        typer.Option(
            "--concurrency",
            "-c",
            help="So many clients with one request at a time each, instead of a rate: 1,8,32.",
            show_default=False,
            rich_help_panel=_WHEN,
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
            rich_help_panel=_WHEN,
        ),
    ] = None,
    arrivals: Annotated[
        str,
        typer.Option(
            help="poisson, gamma (see --cv) or trace (as recorded; stretched to --rate if given).",
            rich_help_panel=_WHEN,
        ),
    ] = "poisson",
    cv: Annotated[
        float,
        typer.Option(
            help="Standard deviation over mean of gamma gaps: more is bursty.",
            rich_help_panel=_WHEN,
        ),
    ] = 1.0,
    warmup: Annotated[
        int,
        typer.Option(min=0, help="Requests before that do not count.", rich_help_panel=_WHEN),
    ] = 1,
    endpoint: Annotated[
        str, typer.Option(help="completions or chat.", rich_help_panel=_HOW)
    ] = "completions",
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Answers of the full length.", rich_help_panel=_HOW),
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0: greedy.", rich_help_panel=_HOW)
    ] = 0.0,
    extra_body: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Further fields of every body.",
            show_default=False,
            rich_help_panel=_HOW,
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
            rich_help_panel=_HOW,
        ),
    ] = None,
    service_class: Annotated[
        str | None,
        typer.Option(
            help="Header x-fastserve-class of every request.",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(
            help="Header x-fastserve-tenant of every request.",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    tenants: Annotated[
        int, typer.Option(min=1, help="Spread over so many tenants.", rich_help_panel=_HOW)
    ] = 1,
    tenant_skew: Annotated[
        float,
        typer.Option(help="Tenant k sends in proportion to 1 / k^SKEW.", rich_help_panel=_HOW),
    ] = 0.0,
    timeout: Annotated[
        float,
        typer.Option(help="Seconds after which a request has failed.", rich_help_panel=_HOW),
    ] = 600.0,
    slo_ttft: Annotated[
        float | None,
        typer.Option(
            help="Seconds to the first token: counts towards goodput.",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    slo_tpot: Annotated[
        float | None,
        typer.Option(
            help="Seconds per token after the first, likewise.",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object per run, a line each.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for runs.csv, load.png and load.svg.",
            show_default=False,
            rich_help_panel=_OUTPUT,
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


@app.command(cls=OneSentence)
def compare(
    model: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face folder or .gguf file (default: SmolLM2-135M-Instruct).",
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            help="The same weights for llama.cpp (default: the model, if it is a GGUF file).",
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = None,
    fastserve: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FLAGS",
            help='Flags of `fastserve up`, such as "--dtype bfloat16"; repeat to compare several.',
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = None,
    vllm: Annotated[
        Path | None,
        typer.Option(
            help="Environment or executable of vLLM (default: on PATH).",
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = None,
    llama_server: Annotated[
        Path | None,
        typer.Option(
            help="Executable of llama.cpp's server (default: on PATH).",
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = None,
    llama_types: Annotated[
        list[str] | None,
        typer.Option(
            help="What llama.cpp's weights are quantised to beside the file as it is (default: "
            "Q8_0); needs llama-quantize beside its server; none: nothing.",
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = None,
    openvino: Annotated[
        Path | None,
        typer.Option(
            help="Environment of OpenVINO GenAI, which gets the files that llama.cpp gets.",
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = None,
    transformers: Annotated[
        Path | None,
        typer.Option(
            help="Environment or executable of transformers (default: on PATH).",
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Of fastserve,vllm,llama.cpp,openvino,transformers, in this order (default: all).",
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = None,
    concurrency: Annotated[
        list[str] | None,
        typer.Option(
            "--concurrency",
            "-c",
            help="Requests at a time (default: 1,8,32, or none with --rate).",
            show_default=False,
            rich_help_panel=_WHEN,
        ),
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(
            "--rate",
            "-r",
            help="Requests per second, on schedule.",
            show_default=False,
            rich_help_panel=_WHEN,
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
            rich_help_panel=_WHEN,
        ),
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(min=1, help="Runs of each kind; the best counts.", rich_help_panel=_WHEN),
    ] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, rich_help_panel=_WHAT)] = 44,
    output_tokens: Annotated[int, typer.Option(min=1, rich_help_panel=_WHAT)] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts.", rich_help_panel=_WHAT)] = 0,
    start_timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds that a server has to come up.", rich_help_panel=_HOW),
    ] = 300.0,
    timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds after which a request has failed.", rich_help_panel=_HOW),
    ] = 600.0,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object per run, a line each.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for compare.csv and plots.", show_default=False, rich_help_panel=_OUTPUT
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


@app.command(cls=OneSentence)
def memory(
    model: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face folder or .gguf file (default: SmolLM2-135M-Instruct).",
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Of proactive,reactive,recompute,defer,fcfs and the variants, in this order "
            "(default: all).",
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FLAGS",
            help="A further deployment, with flags of `fastserve up`; repeat for more.",
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Of all but fcfs.", rich_help_panel=_WHO)
    ] = "fastserve",
    rows: Annotated[
        int, typer.Option(min=1, help="Most jobs in an iteration.", rich_help_panel=_WHO)
    ] = 4,
    jobs: Annotated[
        float,
        typer.Option(
            min=1, help="Jobs of average length that KV memory is for.", rich_help_panel=_WHO
        ),
    ] = 8,
    load: Annotated[
        list[str] | None,
        typer.Option(
            help="Requests per second over the capacity (default: 0.7,1,1.5).",
            show_default=False,
            rich_help_panel=_WHEN,
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(min=1, help="In which the requests of a run are sent.", rich_help_panel=_WHEN),
    ] = 45.0,
    capacity_requests: Annotated[
        int,
        typer.Option(min=2, help="By which capacity is measured.", rich_help_panel=_WHEN),
    ] = 24,
    workload: Annotated[
        str, typer.Option("--workload", "-w", help="Lengths.", rich_help_panel=_WHAT)
    ] = "sharegpt",
    shrink: Annotated[
        float, typer.Option(min=0.01, help="Lengths are divided by it.", rich_help_panel=_WHAT)
    ] = 2.0,
    longest: Annotated[
        int, typer.Option(min=2, help="Most tokens of a request.", rich_help_panel=_WHAT)
    ] = 512,
    seed: Annotated[int, typer.Option(min=0, help="First seed.", rich_help_panel=_WHAT)] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="How many seeds, from --seed on.", rich_help_panel=_WHAT)
    ] = 1,
    start_timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds that a deployment has to come up.", rich_help_panel=_HOW),
    ] = 300.0,
    timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds after which a request has failed.", rich_help_panel=_HOW),
    ] = 600.0,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object per run, a line each.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for memory.csv and plots.", show_default=False, rich_help_panel=_OUTPUT
        ),
    ] = None,
) -> None:
    """Measure what becomes of KV caches when the device is full, strategy by strategy.

    Starts a FastServe for each, with KV memory for a few jobs, measures the capacity, and sends
    each the same requests on the same schedule, one deployment after the other at each load, so
    that what disturbs the machine disturbs all alike. Examples:

        fastserve bench memory --load 0.7,1,1.5 --out results

        fastserve bench memory --only proactive,plain --variant "plain=--no-kv-write-through"

    On a busy machine the figures mean nothing.
    """
    from fastserve.bench.memory.command import Asked, run

    run(
        Asked(
            model=model,
            only=only or [],
            variant=variant or [],
            policy=policy,
            rows=rows,
            jobs=jobs,
            loads=load or ["0.7,1,1.5"],
            seconds=seconds,
            workload=workload,
            shrink=shrink,
            longest=longest,
            capacity_requests=capacity_requests,
            seed=seed,
            seeds=seeds,
            start_timeout=start_timeout,
            timeout=timeout,
            as_json=as_json,
            out=out,
        )
    )


def _running_here() -> str:
    """URL of the `fastserve up` of this machine, or where one would be."""
    running = StateFolder(default_folder()).read()
    return str(running["url"]) if running else "http://127.0.0.1:8000"


# What needs the model runs in a process of the worker's package, since nothing else may import
# PyTorch; it takes the options and prints the help itself.
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
