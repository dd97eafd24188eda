"""From what was typed to what is simulated or sent. Errors are ValueErrors of one sentence."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Final

from fastserve.bench.sim.hardware import OPT_13B, Hardware, load_hardware
from fastserve.bench.sim.types import SimOptions
from fastserve.bench.workloads import Trace, check_workload, read_trace
from fastserve.scheduler.core import KvStrategy, SchedulerConfig, UnknownPolicyError
from fastserve.scheduler.core.policies import policy_named

DEFAULT_WORKLOAD: Final = "sharegpt"
UNLIMITED: Final = "unlimited"
HOST_KV_FACTOR: Final = 10  # host KV memory per device KV memory, where nothing is said
# Fields of SchedulerConfig that the simulator sets itself.
_OWN: Final = {field.name for field in dataclasses.fields(SimOptions)} | {"max_queued_jobs"}


def listed(values: Sequence[str]) -> list[str]:
    """Values given several times, or once with commas between them."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def workload(name: str | None, trace: Path | None, arrivals: str) -> str | Trace:
    """A recorded trace, or the name of a workload."""
    recorded = arrivals == "trace"
    if trace is not None:
        if name is not None:
            raise ValueError("--workload and --trace exclude each other")
        return read_trace(trace, arrivals=recorded)
    if recorded:
        raise ValueError("--arrivals trace needs --trace FILE.csv")
    name = name or DEFAULT_WORKLOAD
    check_workload(name)
    return name


def rates(values: Sequence[str]) -> list[float]:
    """Jobs per second, each once, in the order given."""
    found = []
    for text in listed(values):
        try:
            found.append(float(text))
        except ValueError:
            raise ValueError(f"--rate: {text!r} is not a number") from None
    return list(dict.fromkeys(found))


def speeds(workers: int, values: Sequence[str]) -> tuple[float, ...]:
    """Of each worker group, against the machine's formula; all alike where nothing is said."""
    found = []
    for text in listed(values):
        try:
            found.append(float(text))
        except ValueError:
            raise ValueError(f"--worker-speed: {text!r} is not a number") from None
        if not 0 < found[-1] < float("inf"):
            raise ValueError(f"--worker-speed must be greater than 0, not {text}")
    if found and len(found) != workers:
        raise ValueError(f"--worker-speed has {len(found)} values for {workers} workers")
    return tuple(found) or (1.0,) * workers


def hardware(cost_model: Path | None) -> Hardware:
    """The machine of a cost model file; OPT-13B on one A100 where there is none."""
    return OPT_13B if cost_model is None else load_hardware(cost_model)


def kv_tokens(text: str | None, machine: Hardware) -> int | None:
    """Tokens of device KV memory; None: unlimited."""
    if text is None:
        return machine.kv_capacity_tokens
    if text == UNLIMITED:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"--kv-tokens: {text!r} is neither a whole number nor {UNLIMITED!r}"
        ) from None


def kv_strategy(text: str) -> KvStrategy:
    """What becomes of KV caches when the device is full."""
    try:
        return KvStrategy(text)
    except ValueError:
        known = ", ".join(KvStrategy)
        raise ValueError(f"--kv-strategy: {text!r} is unknown: choose one of {known}") from None


def scheduler_fields(assignments: Sequence[str]) -> dict[str, Any]:
    """Fields of SchedulerConfig from words like `levels=6`, with the types of the fields."""
    hints = typing.get_type_hints(SchedulerConfig)
    known = [name for name in hints if name not in _OWN]
    found = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"--set: {assignment!r} is not of the form name=value")
        if name == "max_queued_jobs":
            raise ValueError("--set: max_queued_jobs has no meaning here: every job is admitted")
        if name in _OWN and name in hints:
            raise ValueError(f"--set: {name} has an option of its own, --{name.replace('_', '-')}")
        if name not in hints:
            raise ValueError(f"--set: {name!r} is unknown: choose one of {', '.join(known)}")
        found[name] = typed(name, text.strip(), hints[name])
    return found


def typed(name: str, text: str, hint: Any) -> Any:
    """`text` as a value of the type `hint`: a number, bool, str or enum, or None where allowed."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in choices and text.lower() == "none":
        return None
    for kind in choices:
        if kind is type(None):
            continue
        if kind is bool:
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
        elif kind in (int, float, str) or (isinstance(kind, type) and issubclass(kind, Enum)):
            try:
                return kind(text)
            except ValueError:
                continue
    raise ValueError(f"--set: {name} must be {_kinds(choices)}, not {text!r}")


def _kinds(choices: Sequence[Any]) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}
    return " or ".join(
        "one of " + ", ".join(str(member.value) for member in kind)
        if isinstance(kind, type) and issubclass(kind, Enum)
        else words.get(kind, "something that cannot be given here")
        for kind in choices
    )


def check(options: SimOptions) -> SimOptions:
    """The same options. Raises ValueError when the scheduler or the machine cannot have them."""
    try:
        policy_named(options.policy)
    except UnknownPolicyError as error:
        raise ValueError(str(error)) from None
    SchedulerConfig(
        policy=options.policy,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        lease=options.lease,
        kv_strategy=KvStrategy(options.kv_strategy),
        **options.scheduler,
    )
    if options.block_size < 1:
        raise ValueError(f"--block-size must be at least 1, not {options.block_size}")
    if options.kv_tokens is not None and options.kv_tokens < options.block_size:
        raise ValueError(
            f"--kv-tokens must be at least one block of {options.block_size} tokens, "
            f"not {options.kv_tokens}"
        )
    if options.host_kv_tokens < 0:
        raise ValueError(f"--host-kv-tokens must be 0 or more, not {options.host_kv_tokens}")
    if not 0 < options.pcie_gbps < float("inf"):
        raise ValueError(f"--pcie-gbps must be greater than 0, not {options.pcie_gbps:g}")
    return options
