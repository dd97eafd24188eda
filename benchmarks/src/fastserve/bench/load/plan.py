"""From lengths and moments to requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from fastserve.bench.load.prompts import FilePrompt, PromptMaker
from fastserve.bench.load.types import LoadRequest
from fastserve.bench.sim.types import SimJob

TENANT_HEADER: Final = "x-fastserve-tenant"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Fixed lengths in tokens instead of those of the workload; `longest`: prompt and output."""

    prompt: int | None = None
    output: int | None = None
    longest: int | None = None


def fit(jobs: Sequence[SimJob], lengths: Lengths) -> tuple[list[SimJob], int]:
    """The jobs with fixed lengths put in and none beyond the longest; and how many were cut."""
    found, cut = [], 0
    for job in jobs:
        prompt, output = lengths.prompt or job.prompt_tokens, lengths.output or job.output_tokens
        if lengths.longest is not None and prompt + output > lengths.longest:
            cut += 1
            prompt = min(prompt, lengths.longest - 1)
            output = min(output, lengths.longest - prompt)
        found.append(job._replace(prompt_tokens=prompt, output_tokens=output))
    return found, cut


def made(
    jobs: Sequence[SimJob], maker: PromptMaker, seed: int, headers: Mapping[str, str]
) -> list[LoadRequest]:
    """Requests with prompts made to the lengths of the jobs."""
    rng = np.random.default_rng((seed, 1))  # apart from the numbers that drew the jobs
    return [
        LoadRequest(
            due_s=job.arrival_s,
            prompt=maker.make(job.prompt_tokens, rng),
            prompt_tokens=job.prompt_tokens,
            max_tokens=job.output_tokens,
            headers=_headers(job, headers),
        )
        for job in jobs
    ]


def from_file(
    jobs: Sequence[SimJob],
    prompts: Sequence[FilePrompt],
    output: int | None,
    default_output: int,
    seed: int,
    headers: Mapping[str, str],
) -> list[LoadRequest]:
    """Requests with prompts of a file in random order, each as often as the others or once more.

    Their output: `output` for all, else what the file says, else `default_output` tokens.
    """
    rng = np.random.default_rng((seed, 1))
    order: list[int] = []
    while len(order) < len(jobs):
        order += rng.permutation(len(prompts)).tolist()
    return [
        LoadRequest(
            due_s=job.arrival_s,
            prompt=prompt.text,
            prompt_tokens=None,
            max_tokens=output or prompt.output_tokens or default_output,
            headers=_headers(job, headers),
        )
        for job, prompt in zip(jobs, (prompts[at] for at in order), strict=False)
    ]


def _headers(job: SimJob, headers: Mapping[str, str]) -> Mapping[str, str]:
    return headers if job.tenant == "default" else {**headers, TENANT_HEADER: job.tenant}


def at_once(requests: Sequence[LoadRequest]) -> list[LoadRequest]:
    """The same without moments."""
    return [replace(request, due_s=0.0) for request in requests]
