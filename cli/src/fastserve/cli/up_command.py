"""The options of `fastserve up`; `up.py` does the work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastserve.cli.options import StateDir, folder
from fastserve.cli.stack import Options

_ORDER = "Scheduling"
_SIZES = "Sizes and limits"
_PLACES = "Where"


def up(
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return once it is ready; it runs on.")
    ] = False,
    demo: Annotated[bool, typer.Option("--demo", help="Stream one answer when ready.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Hugging Face folder or .gguf file (default: SmolLM2-135M-Instruct)."),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model in requests.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="skip-join-mlfq, fastserve, mlfq, fixed-priority, hrrn, fcfs or srpt.",
            rich_help_panel=_ORDER,
        ),
    ] = None,
    fair_sharing: Annotated[
        bool | None,
        typer.Option(
            "--fair-sharing/--no-fair-sharing",
            help="Share service between the tenants of a class.",
            show_default=False,
            rich_help_panel=_ORDER,
        ),
    ] = None,
    quantum: Annotated[
        float | None,
        typer.Option(
            help="Seconds of service in the first level (default: measured).",
            rich_help_panel=_ORDER,
        ),
    ] = None,
    starvation_threshold: Annotated[
        float | None,
        typer.Option(
            help="Seconds a job waits before it is lifted; inf: never.", rich_help_panel=_ORDER
        ),
    ] = None,
    prefix_cache: Annotated[
        str | None,
        typer.Option(
            help="Who shares KV of equal beginnings: off, tenant or all.", rich_help_panel=_ORDER
        ),
    ] = None,
    kv_strategy: Annotated[
        str | None,
        typer.Option(help="proactive, reactive, recompute or defer.", rich_help_panel=_ORDER),
    ] = None,
    kv_write_through: Annotated[
        bool | None,
        typer.Option(
            "--kv-write-through/--no-kv-write-through",
            help="Copy full KV blocks to the host ahead of need.",
            show_default=False,
            rich_help_panel=_ORDER,
        ),
    ] = None,
    max_num_partial_prefills: Annotated[
        int | None,
        typer.Option(
            help="Prompts of several iterations under way at once.", rich_help_panel=_ORDER
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Key that requests must carry; repeat for more.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with keys, one a line, each with what it grants if that is limited: "
            "KEY tenant=NAME class=NAME weight=NUMBER."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on.", rich_help_panel=_PLACES)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port (0: any free one).", min=0, max=65535, rich_help_panel=_PLACES)
    ] = 8000,
    redis_url: Annotated[
        str | None,
        typer.Option(help="A Redis or Valkey server (default: embedded).", rich_help_panel=_PLACES),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_PLACES)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_PLACES),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Of weights: none or int8 (CPU).", rich_help_panel=_PLACES)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the worker.", rich_help_panel=_PLACES)
    ] = None,
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option(help="Ranks that share every layer.", min=1, rich_help_panel=_PLACES),
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None,
        typer.Option(help="Stages of layers, in turn.", min=1, rich_help_panel=_PLACES),
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Most jobs in an iteration.", rich_help_panel=_SIZES)
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Most tokens in an iteration.", rich_help_panel=_SIZES)
    ] = None,
    max_num_queued_reqs: Annotated[
        int | None, typer.Option(help="Waiting jobs before 429.", rich_help_panel=_SIZES)
    ] = None,
    scheduler_replicas: Annotated[
        int,
        typer.Option(
            help="Schedulers: one leads, the others stand by.", min=1, rich_help_panel=_SIZES
        ),
    ] = 1,
    max_model_len: Annotated[
        int | None, typer.Option(help="Most tokens of a request.", rich_help_panel=_SIZES)
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens in a KV block.", rich_help_panel=_SIZES)
    ] = None,
    kv_blocks: Annotated[
        int | None, typer.Option(help="KV blocks on the device.", rich_help_panel=_SIZES)
    ] = None,
    host_kv_blocks: Annotated[
        int | None,
        typer.Option(help="KV blocks in host memory (instead of size).", rich_help_panel=_SIZES),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(help="Host memory for KV, such as 2G.", rich_help_panel=_SIZES),
    ] = None,
    disk_path: Annotated[
        Path | None,
        typer.Option(help="Folder for KV that host memory cannot hold.", rich_help_panel=_SIZES),
    ] = None,
    disk_size: Annotated[
        str | None,
        typer.Option(help="How much of it to use, such as 20G.", rich_help_panel=_SIZES),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    state_dir: StateDir = None,
) -> None:
    """Start Valkey, kv-offload, worker, scheduler and gateway on this machine.

    Stays in the foreground until Ctrl-C, which stops all of it. Examples:

        fastserve up --demo

        fastserve up --detach --model ./Qwen3-0.6B --port 9000

        fastserve up --policy fcfs --max-num-seqs 4 --kv-blocks 64

    Without --policy, --max-num-seqs and so on, the defaults of the services hold (also:
    FASTSERVE_MAX_NUM_SEQS and the like in the environment, for every option of every service).
    """
    from fastserve.cli.up import detached, foreground

    options = Options(
        model=model,
        served_model_name=served_model_name,
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        api_key_file=api_key_file,
        policy=policy,
        fair_sharing=fair_sharing,
        quantum=quantum,
        prefix_cache=prefix_cache,
        kv_strategy=kv_strategy,
        kv_write_through=kv_write_through,
        max_num_partial_prefills=max_num_partial_prefills,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_queued_reqs=max_num_queued_reqs,
        starvation_threshold=starvation_threshold,
        scheduler_replicas=scheduler_replicas,
        max_model_len=max_model_len,
        block_size=block_size,
        kv_blocks=kv_blocks,
        host_kv_blocks=host_kv_blocks,
        host_memory=host_memory,
        disk_path=disk_path,
        disk_size=disk_size,
        device=device,
        dtype=dtype,
        quantization=quantization,
        threads=threads,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        redis_url=redis_url,
        log_level=log_level,
    )
    where = folder(state_dir)
    if not detach:
        foreground(options, where, demo=demo)
        return
    arguments = [word for word in sys.argv[2:] if word not in ("--detach", "-d")]
    detached(arguments, options, where)
