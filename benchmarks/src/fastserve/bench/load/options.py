"""From what was typed to what is sent. Errors are ValueErrors of one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fastserve.bench.arrivals import ArrivalKind, Arrivals, LoadError, check_rate
from fastserve.bench.load.plan import Lengths, fit, from_file, made
from fastserve.bench.load.prompts import FilePrompt, PromptMaker, prompt_maker, read_prompts
from fastserve.bench.load.report import Slo
from fastserve.bench.load.target import ENDPOINTS, Asking, Target
from fastserve.bench.load.types import LoadRequest
from fastserve.bench.options import listed, workload
from fastserve.bench.options import rates as read_rates
from fastserve.bench.workloads import Trace, generate

DEFAULT_REQUESTS: Final = 200
DEFAULT_RATE: Final = 1.0
FILE_OUTPUT_TOKENS: Final = 128  # of a prompt whose line does not say
CLASS_HEADER: Final = "x-fastserve-class"
TENANT_HEADER: Final = "x-fastserve-tenant"


@dataclass(frozen=True, slots=True)
class Level:
    """One run: a rate (None: as recorded), or a number of clients."""

    rate: float | None = None
    concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of `fastserve bench serve` as typed."""

    url: str
    model: str | None
    api_key: str | None
    endpoint: str
    workload: str | None
    trace: Path | None
    prompts: Path | None
    tokenizer: Path | None
    prompt_tokens: int | None
    output_tokens: int | None
    arrivals: str
    cv: float
    rates: Sequence[str]
    concurrency: Sequence[str]
    requests: int | None
    seed: int
    tenants: int
    tenant_skew: float
    service_class: str | None
    tenant: str | None
    headers: Sequence[str]
    extra_body: str | None
    temperature: float | None
    ignore_eos: bool
    timeout: float
    warmup: int
    slo_ttft: float | None
    slo_tpot: float | None
    as_json: bool
    out: Path | None


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent, checked."""

    workload: str | Trace
    prompts: Sequence[FilePrompt] | None
    arrivals: Arrivals
    levels: Sequence[Level]
    requests: int
    lengths: Lengths
    headers: dict[str, str]
    asking: Asking
    slo: Slo

    @property
    def name(self) -> str:
        """Of what is sent, for people."""
        lengths = self.lengths
        if lengths.prompt and lengths.output:
            return f"{lengths.prompt} tokens in, {lengths.output} out"
        return self.workload if isinstance(self.workload, str) else self.workload.name


def check(asked: Asked) -> Load:
    """Raises ValueError with one sentence."""
    if asked.endpoint not in ENDPOINTS:
        raise ValueError(f"--endpoint must be one of {', '.join(ENDPOINTS)}, not {asked.endpoint}")
    if not (math.isfinite(asked.timeout) and asked.timeout > 0):
        raise ValueError(f"--timeout must be greater than 0, not {asked.timeout:g}")
    for name, value in (("--slo-ttft", asked.slo_ttft), ("--slo-tpot", asked.slo_tpot)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be greater than 0, not {value:g}")
    arrivals = Arrivals(_kind(asked.arrivals), asked.cv)
    lengths = _workload(asked)
    recorded = isinstance(lengths, Trace) and arrivals.kind == "trace"
    return Load(
        workload=lengths,
        prompts=None if asked.prompts is None else read_prompts(asked.prompts),
        arrivals=arrivals,
        levels=_levels(asked),
        requests=asked.requests or (len(lengths) if recorded else DEFAULT_REQUESTS),
        lengths=Lengths(asked.prompt_tokens, asked.output_tokens),
        headers=_headers(asked),
        asking=Asking(
            endpoint=asked.endpoint,
            ignore_eos=asked.ignore_eos,
            temperature=asked.temperature,
            timeout_s=asked.timeout,
            extra=_extra(asked.extra_body),
        ),
        slo=Slo(asked.slo_ttft, asked.slo_tpot),
    )


def _kind(text: str) -> ArrivalKind:
    kind: Any = text  # Arrivals checks it
    return kind  # type: ignore[no-any-return]


def _workload(asked: Asked) -> str | Trace:
    if asked.prompts is not None and (
        asked.workload is not None or asked.prompt_tokens is not None
    ):
        raise ValueError("--prompts gives the prompts: leave out --workload and --prompt-tokens")
    return workload(asked.workload, asked.trace, asked.arrivals)


def _levels(asked: Asked) -> list[Level]:
    if asked.rates and asked.concurrency:
        raise ValueError("--rate and --concurrency exclude each other")
    if asked.concurrency:
        if asked.arrivals == "trace":
            raise ValueError("with --concurrency requests do not arrive: leave out --arrivals")
        return [Level(concurrency=count) for count in concurrencies(asked.concurrency)]
    rates = read_rates(asked.rates)
    for rate in rates:
        check_rate(rate)
    if not rates:
        return [Level(rate=None if asked.arrivals == "trace" else DEFAULT_RATE)]
    return [Level(rate=rate) for rate in rates]


def concurrencies(values: Sequence[str]) -> list[int]:
    """Numbers of clients, each once, in the order given."""
    found = []
    for text in listed(values):
        if not text.isdecimal() or not int(text):
            raise ValueError(f"--concurrency: {text!r} is not a whole number from 1 on")
        found.append(int(text))
    return list(dict.fromkeys(found))


def _headers(asked: Asked) -> dict[str, str]:
    headers = {}
    for text in asked.headers:
        name, colon, value = text.partition(":")
        if not colon or not name.strip() or any(char in text for char in "\r\n"):
            raise ValueError(f"--header: {text!r} is not of the form NAME: VALUE")
        headers[name.strip()] = value.strip()
    if asked.service_class is not None:
        headers[CLASS_HEADER] = asked.service_class
    if asked.tenant is not None:
        if asked.tenants > 1:
            raise ValueError("--tenant and --tenants exclude each other")
        headers[TENANT_HEADER] = asked.tenant
    return headers


def _extra(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        extra = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--extra-body is not JSON: {error}") from None
    if not isinstance(extra, dict):
        raise ValueError("--extra-body must be a JSON object")
    return extra


async def requests_of(
    load: Load, asked: Asked, level: Level, target: Target, maker: PromptMaker | None
) -> tuple[list[LoadRequest], int]:
    """The requests of a run, the same ones for the same seed; and how many were cut to the length
    of the model. Raises `LoadError`."""
    jobs = generate(
        load.workload,
        load.requests,
        asked.seed,
        load.arrivals,
        # In a closed loop nothing arrives: any rate gives the lengths and tenants.
        1.0 if level.concurrency is not None else level.rate,
        tenants=asked.tenants,
        tenant_skew=asked.tenant_skew,
    )
    if load.prompts is not None:
        output = load.lengths.output
        prompts = load.prompts
        return from_file(jobs, prompts, output, FILE_OUTPUT_TOKENS, asked.seed, load.headers), 0
    if maker is None:
        raise LoadError("there is nothing to make prompts with")
    lengths = Lengths(load.lengths.prompt, load.lengths.output, target.max_model_len)
    jobs, cut = fit(jobs, lengths)
    return made(jobs, maker, asked.seed, load.headers), cut


async def maker_of(load: Load, asked: Asked, target: Target) -> PromptMaker | None:
    """None where the prompts come from a file. Raises `PromptError`."""
    return None if load.prompts is not None else await prompt_maker(target, asked.tokenizer)
