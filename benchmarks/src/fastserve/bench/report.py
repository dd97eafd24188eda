"""What a simulation says about latency, throughput and fairness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from fastserve.bench.sim.types import SimResult

Seconds = NDArray[np.float64]

# Key in the report, and what people call it.
LATENCIES: Final = {
    "per_token_s": "per-token latency",
    "ttft_s": "time to first token",
    "tpot_s": "time per output token",
    "e2e_s": "end to end",
}
PERCENTILES: Final = (50, 95, 99)
SHORT_PROMPT_TOKENS: Final = 256  # the most that counts as short in `ttft_short_s`
STATISTICS: Final = ("mean", "p50", "p95", "p99")


def latencies(result: SimResult) -> dict[str, Seconds]:
    """Seconds per job by metric, keys of `LATENCIES`; nan where a job has no such figure.

    Per-token latency is end-to-end latency over output tokens (the paper's metric), queueing
    included; TPOT is the time between two tokens, which a job with one token does not have.
    A job that failed counts with the worst value of any that did not, in every metric: giving up
    on a job never makes a figure better. nan if all failed.
    """
    e2e = result.end_s - result.arrival_s
    gaps = np.where(result.output_tokens > 1, result.output_tokens - 1, np.nan)
    found = {
        "per_token_s": e2e / result.output_tokens,
        "ttft_s": result.first_token_s - result.arrival_s,
        "tpot_s": (result.end_s - result.first_token_s) / gaps,
        "e2e_s": e2e,
    }
    failed = np.isnan(result.end_s)
    for values in found.values():
        if failed.any() and not np.isnan(values).all():
            values[failed] = np.nanmax(values[~failed])
    return found


def summary(values: Seconds) -> dict[str, float | None]:
    """Mean and percentiles (linear between two jobs) of the jobs that have the figure, or Nones."""
    values = values[~np.isnan(values)]
    if not len(values):
        return dict.fromkeys(STATISTICS)
    points = np.percentile(values, PERCENTILES).tolist()
    return {"mean": float(values.mean()), **dict(zip(STATISTICS[1:], points, strict=True))}


def jain_index(per_token_s: Seconds, tenants: Sequence[str]) -> float | None:
    """Jain's index of the tenants' mean per-token latencies, (sum x)^2 / (n * sum x^2).

    1: every tenant waits as long for a token as the others; 1 / n: one waits, the others do not.
    Of latencies and not of rates, in which one starved tenant among many hardly shows. None if no
    job has a latency.
    """
    _, number_of = np.unique(np.array(tenants), return_inverse=True)
    known = ~np.isnan(per_token_s)
    if not known.any():
        return None
    counts = np.bincount(number_of[known])
    sums = np.bincount(number_of[known], weights=per_token_s[known])
    means = sums[counts > 0] / counts[counts > 0]
    return float(means.sum() ** 2 / (len(means) * np.square(means).sum()))


def service_jain_index(result: SimResult) -> float | None:
    """Jain's index of the service that tenants had until the last job arrived, over what was due to
    them: the max-min fair share of all of it, no more than their jobs took in the end.

    1: each got what was due to it; 1 / n: one of n got everything. None if nobody got anything.
    """
    _, number_of = np.unique(np.array(result.tenants), return_inverse=True)
    got = np.bincount(number_of, weights=result.served_s).astype(np.float64)
    asked = np.bincount(number_of, weights=result.service_s).astype(np.float64)
    if not got.any():
        return None
    ratios = got / _max_min_shares(float(got.sum()), asked)
    return float(ratios.sum() ** 2 / (len(ratios) * np.square(ratios).sum()))


def _max_min_shares(total: float, asked: Seconds) -> Seconds:
    """`total` dealt out evenly, but to nobody more than asked for: what one leaves others get."""
    shares = np.empty(len(asked))
    for taken, number in enumerate(np.argsort(asked)):
        shares[number] = min(float(asked[number]), total / (len(asked) - taken))
        total -= shares[number]
    return shares


def lightest_tenant(tenants: Sequence[str]) -> str:
    """The one that sent the fewest jobs; of several, the last by name."""
    counts = Counter(tenants)
    return max(counts, key=lambda tenant: (-counts[tenant], tenant))


def report(
    result: SimResult, *, policy: str, rate: float | None, seed: int, kv_bytes_per_token: int
) -> dict[str, Any]:
    """The JSON object of one run. `rate` in jobs per second; None where no time passes.

    `ttft_short_s` is TTFT of the jobs with short prompts alone: how much long ones stall them;
    `ttft_light_s`, `per_token_light_s` are of the tenant with the fewest jobs: how much the others
    stall it.
    """
    found = latencies(result)
    done = ~np.isnan(result.end_s)
    tokens = int(result.output_tokens[done].sum())
    moved = result.offloaded_tokens + result.uploaded_tokens
    short = result.prompt_tokens <= SHORT_PROMPT_TOKENS
    light = np.array(result.tenants) == lightest_tenant(result.tenants)
    return {
        "policy": policy,
        "rate": rate,
        "jobs": len(result.arrival_s),
        "seed": seed,
        **{name: summary(values) for name, values in found.items()},
        "output_tokens_per_s": tokens / result.makespan_s if result.makespan_s > 0 else 0.0,
        "preemptions": result.preemptions,
        "offloaded_tokens": result.offloaded_tokens,
        "uploaded_tokens": result.uploaded_tokens,
        "makespan_s": result.makespan_s,
        "failed": result.failed,
        "recomputed_tokens": result.recomputed_tokens,
        "migrations": result.migrations,
        "ttft_short_s": summary(found["ttft_s"][short]),
        "ttft_light_s": summary(found["ttft_s"][light]),
        "per_token_light_s": summary(found["per_token_s"][light]),
        "kv_wait_s": result.kv_wait_s,
        "kv_wait_share": result.kv_wait_s / result.row_s if result.row_s else 0.0,
        "moved_bytes": moved * kv_bytes_per_token,
        "jain_index": jain_index(found["per_token_s"], result.tenants),
        "service_jain_index": service_jain_index(result),
        "tenants": len(set(result.tenants)),
        "mean_prompt_tokens": float(result.prompt_tokens.mean()),
        "mean_output_tokens": float(result.output_tokens.mean()),
    }


def table(found: dict[str, Any]) -> Table:
    """A report for people: latencies in a table, the rest below it."""
    rate = "" if found["rate"] is None else f" at {found['rate']:g} job/s"
    shown = Table(
        title=f"{found['policy']}{rate}, {found['jobs']:,} jobs, seed {found['seed']}",
        title_justify="left",
        caption=_rest(found),
        caption_justify="left",
        caption_style="",
    )
    shown.add_column("seconds")
    for name in STATISTICS:
        shown.add_column(name.upper() if name != "mean" else name, justify="right")
    for key, words in LATENCIES.items():
        shown.add_row(words, *(seconds(found[key][name]) for name in STATISTICS))
    if found["ttft_short_s"] != found["ttft_s"]:
        words = f"TTFT, prompts up to {SHORT_PROMPT_TOKENS} tokens"
        shown.add_row(words, *(seconds(found["ttft_short_s"][name]) for name in STATISTICS))
    if found["tenants"] > 1:
        words = "TTFT, the lightest tenant"
        shown.add_row(words, *(seconds(found["ttft_light_s"][name]) for name in STATISTICS))
        words = "per token, the lightest tenant"
        shown.add_row(words, *(seconds(found["per_token_light_s"][name]) for name in STATISTICS))
    return shown


def seconds(value: float | None) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _rest(found: dict[str, Any]) -> str:
    lines = [
        f"mean lengths        {found['mean_prompt_tokens']:,.0f} tokens in, "
        f"{found['mean_output_tokens']:,.0f} out",
        f"throughput          {found['output_tokens_per_s']:,.1f} output tokens/s",
        f"makespan            {found['makespan_s']:,.1f} s",
        f"preemptions         {found['preemptions']:,}",
        f"migrations          {found['migrations']:,}",
        f"KV to the host      {found['offloaded_tokens']:,} tokens",
        f"KV from the host    {found['uploaded_tokens']:,} tokens",
        f"KV recomputed       {found['recomputed_tokens']:,} tokens",
        f"waiting for KV      {found['kv_wait_s']:,.1f} s, "
        f"{found['kv_wait_share']:.2%} of the time of execution",
        f"bytes moved         {found['moved_bytes'] / 1e9:,.2f} GB",
    ]
    if found["tenants"] > 1 and found["jain_index"] is not None:
        lines.append(
            f"Jain's index        {found['jain_index']:.4f} over {found['tenants']} tenants"
        )
        if found["service_jain_index"] is not None:
            lines.append(f"  of service        {found['service_jain_index']:.4f}")
    if found["failed"]:
        lines.append(
            f"failed              {found['failed']:,} (counted with the worst latency of the run)"
        )
    return "\n".join(lines)
