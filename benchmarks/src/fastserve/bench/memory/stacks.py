"""The deployments that are compared, and what their metrics count."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fastserve.bench.arrivals import LoadError
from fastserve.bench.load.target import Target
from fastserve.bench.options import listed
from fastserve.bench.processes import ServerProcess

_TIMEOUT_S: Final = 10.0
MODEL: Final = "measured"
FCFS: Final = "fcfs"
STRATEGIES: Final = ("proactive", "reactive", "recompute", "defer")
# What is compared unless told otherwise, with the flags of `fastserve up`.
VARIANTS: Final = {name: ("--kv-strategy", name) for name in STRATEGIES}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run FastServe. `flags` of `fastserve up`."""

    name: str
    flags: Sequence[str]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of every deployment. `blocks`: on the device; `length`: tokens of the longest job."""

    rows: int
    blocks: int
    host_blocks: int
    block_size: int
    length: int


def variants(only: Sequence[str], further: Sequence[str], policy: str) -> list[Variant]:
    """The strategies under `policy` and first come, first served; `further` are NAME=FLAGS.

    Raises `LoadError`.
    """
    known = {name: ["--policy", policy, *flags] for name, flags in VARIANTS.items()}
    known[FCFS] = ["--policy", FCFS]
    for text in further:
        name, equals, flags = text.partition("=")
        if not equals or not name.strip():
            raise LoadError(f"--variant: {text!r} is not of the form NAME=FLAGS")
        known[name.strip()] = ["--policy", policy, *flags.split()]
    wanted = listed(only) or list(known)
    for name in wanted:
        if name not in known:
            raise LoadError(f"--only: {name!r} is unknown: choose of {', '.join(known)}")
    return [Variant(name, known[name]) for name in dict.fromkeys(wanted)]


def command(variant: Variant, sizes: Sizes, model: Path, state: Path) -> list[str]:
    """`fastserve up` on a port of its own; flags of the variant count where they repeat one."""
    return [
        *(sys.executable, "-m", "fastserve.cli", "up", "--port", "0", "--state-dir", str(state)),
        *("--model", str(model), "--served-model-name", MODEL),
        *("--max-num-seqs", str(sizes.rows), "--max-model-len", str(sizes.length)),
        *("--block-size", str(sizes.block_size), "--kv-blocks", str(sizes.blocks)),
        *("--host-kv-blocks", str(sizes.host_blocks)),
        *variant.flags,
    ]


def on_cores(cores: Collection[int], argv: Sequence[str]) -> list[str]:
    """`argv`, bound to these cores of the machine."""
    bind = f"os.sched_setaffinity(0, {set(cores)}); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", f"import os, sys; {bind}", *argv]


@dataclass(frozen=True, slots=True)
class Stack:
    """A deployment that is up. `metrics`: URL by service."""

    variant: Variant
    process: ServerProcess
    target: Target
    metrics: Mapping[str, str]


def state_of(folder: Path) -> dict[str, Any] | None:
    """What `fastserve up` says of itself; None until it is ready."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return None
    return state if state["ready"] else None


def metrics_of(state: Mapping[str, Any]) -> dict[str, str]:
    return {name: service["metrics"] for name, service in state["services"].items()}


Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read_series(url: str) -> Series:
    """Name and labels -> value. Raises OSError."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
        families = text_string_to_metric_families(response.read().decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def total(series: Series, name: str, **labels: str) -> float:
    """Sum of the series of that name that have these labels."""
    wanted = set(labels.items())
    return sum(value for (known, has), value in series.items() if known == name and wanted <= has)


def counts(scheduler: Series, worker: Series) -> dict[str, float]:
    """What only ever grows, in one place."""

    def of(name: str, **labels: str) -> float:
        return total(scheduler, name, **labels)

    def worked(name: str, **labels: str) -> float:
        return total(worker, name, **labels)

    found = {
        f"preempted_{mode}": of("fastserve_preemptions_total", mode=mode)
        for mode in ("resident", "swap", "recompute")
    }
    for phase in ("decode", "prefill"):
        for part in ("sum", "count"):
            key = f"{phase}_iterations" if part == "count" else f"{phase}_s"
            found[key] = worked(f"fastserve_iteration_seconds_{part}", phase=phase)
    return found | {
        "recomputed_tokens": of("fastserve_kv_tokens_total", operation="recomputed"),
        "kv_wait_s": of("fastserve_kv_wait_seconds_total"),
        "row_s": of("fastserve_row_seconds_total"),
        "bytes_out": worked("fastserve_swap_bytes_total", direction="out"),
        "bytes_in": worked("fastserve_swap_bytes_total", direction="in"),
        "copy_out_s": worked("fastserve_swap_seconds_sum", direction="out"),
        "copy_in_s": worked("fastserve_swap_seconds_sum", direction="in"),
        "control_s": worked("fastserve_control_seconds_sum"),
    }
