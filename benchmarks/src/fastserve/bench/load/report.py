"""What a run says about latency, throughput and failures. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fastserve.bench.load.types import ClientHealth, Outcome, RunResult
from fastserve.bench.report import summary

Report = dict[str, Any]
Seconds = NDArray[np.float64]

# Key in the report, and what people call it.
LATENCIES: Final = {
    "ttft_s": "time to first token",
    "tpot_s": "time per output token",
    "itl_s": "inter-token latency",
    "per_token_s": "per-token latency",
    "e2e_s": "end to end",
}
_LATE_S: Final = 0.005  # a client that is later than this, or than this share of the median first
_LATE_SHARE: Final = 0.05  # token, changes what it measures
_BUSY: Final = 0.9  # CPU use of the client from which on it may be the bottleneck


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds that a request must keep; None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def given(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None


def latencies(outcomes: Sequence[Outcome]) -> dict[str, Seconds]:
    """Seconds per request by metric, nan where a request has no such figure.

    TTFT: due to first text. End to end: due to the end of the answer. TPOT: first to last text over
    the tokens after the first. Per token: end to end over output tokens (the paper's metric). A
    request that failed counts with the worst value of any that did not, or, for TTFT and end to
    end, its own time until then if that is longer: failing never makes a figure better.
    """

    def of(name: str) -> Seconds:
        return np.array([getattr(outcome, name) for outcome in outcomes], np.float64)

    due, first, last, end = of("due"), of("first"), of("last"), of("end")
    tokens = np.array([outcome.output_tokens for outcome in outcomes], np.float64)
    failed = np.array([outcome.error is not None for outcome in outcomes], bool)
    tokens[tokens < 1] = np.nan
    gaps = np.where(tokens > 1, tokens - 1, np.nan)
    e2e = end - due
    found = {
        "ttft_s": first - due,
        "tpot_s": (last - first) / gaps,
        "per_token_s": e2e / tokens,
        "e2e_s": e2e,
    }
    for name, values in found.items():
        good = values[~failed]
        good = good[~np.isnan(good)]
        worst = good.max() if len(good) else np.nan
        if name in ("ttft_s", "e2e_s") and len(good):
            values[failed] = np.maximum(worst, e2e[failed])
        else:
            values[failed] = worst
    return found


def within(slo: Slo, outcomes: Sequence[Outcome], found: dict[str, Seconds]) -> NDArray[np.bool_]:
    """Which requests kept every limit. A failure never does; a single token has no TPOT."""
    kept = np.array([outcome.error is None for outcome in outcomes], bool)
    if slo.ttft_s is not None:
        kept &= found["ttft_s"] <= slo.ttft_s
    if slo.tpot_s is not None:
        kept &= ~(found["tpot_s"] > slo.tpot_s)
    return kept


def report(result: RunResult, slo: Slo, **about: Any) -> Report:
    """The JSON object of one run; `about` says what was run, and comes first.

    Throughput counts complete answers only, over the time from the first request that was due to
    the last end.
    """
    outcomes = result.outcomes
    found = latencies(outcomes)
    good = [outcome for outcome in outcomes if outcome.error is None]
    gaps = [np.frombuffer(outcome.gaps) for outcome in good if outcome.gaps]
    makespan = _makespan(outcomes)
    output = sum(outcome.output_tokens for outcome in good)
    prompt = sum(outcome.prompt_tokens or 0 for outcome in good)
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    kept = int(within(slo, outcomes, found).sum())
    return {
        **about,
        "requests": len(outcomes),
        "failed": len(outcomes) - len(good),
        "unfinished": result.unfinished,
        "not_sent": result.not_sent,
        "makespan_s": makespan,
        "ttft_s": summary(found["ttft_s"]),
        "tpot_s": summary(found["tpot_s"]),
        "itl_s": summary(np.concatenate(gaps) if gaps else np.empty(0)),
        "per_token_s": summary(found["per_token_s"]),
        "e2e_s": summary(found["e2e_s"]),
        "output_tokens_per_s": _rate(output, makespan),
        "prompt_tokens_per_s": _rate(prompt, makespan),
        "requests_per_s": _rate(len(good), makespan),
        "slo_ttft_s": slo.ttft_s,
        "slo_tpot_s": slo.tpot_s,
        "goodput_per_s": _rate(kept, makespan) if slo.given else None,
        "slo_attainment": kept / len(outcomes) if slo.given and outcomes else None,
        "errors": dict(errors.most_common()),
        "output_tokens": output,
        "prompt_tokens": prompt,
        **_counts(good),
        "client": asdict(result.client),
    }


def _counts(good: Sequence[Outcome]) -> dict[str, int]:
    """Whether the answers have the lengths that were asked for."""
    asked = [outcome for outcome in good if outcome.request.prompt_tokens is not None]
    return {
        "without_usage": sum(outcome.completion_tokens is None for outcome in good),
        "shorter_than_asked": sum(o.output_tokens < o.request.max_tokens for o in good),
        "longer_than_asked": sum(o.output_tokens > o.request.max_tokens for o in good),
        "made_prompts": len(asked),
        "exact_prompts": sum(o.prompt_tokens == o.request.prompt_tokens for o in asked),
    }


def _makespan(outcomes: Sequence[Outcome]) -> float:
    if not outcomes:
        return 0.0
    return max(outcome.end for outcome in outcomes) - min(outcome.due for outcome in outcomes)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def warnings(found: Report) -> list[str]:
    """What a reader must know before believing the figures."""
    said = []
    client = ClientHealth(**found["client"])
    ttft = found["ttft_s"]["p50"]
    bound = max(_LATE_S, _LATE_SHARE * ttft) if ttft else _LATE_S
    for what, late in (
        ("requests left late", client.late_p99_s),
        ("the client itself stalled", client.stall_p99_s),
    ):
        if late > bound:
            said.append(f"{what}: P99 {late * 1e3:.1f} ms, which is in the latencies")
    if client.cpu > _BUSY:
        said.append(f"the client used {client.cpu:.0%} of a core: it may be the bottleneck")
    if found["failed"]:
        said.append(
            f"{found['failed']:,} of {found['requests']:,} requests failed; they count with the "
            "worst latency of the run"
        )
    if found["without_usage"]:
        said.append("the server sent no usage: output tokens are counted by events with text")
    if found["ignore_eos"] and found["shorter_than_asked"]:
        said.append(f"{found['shorter_than_asked']:,} answers are shorter than asked")
    if found["longer_than_asked"]:
        said.append(f"{found['longer_than_asked']:,} answers are longer than asked")
    inexact = found["made_prompts"] - found["exact_prompts"]
    if inexact and found["without_usage"] < found["requests"]:
        said.append(
            f"{inexact:,} of {found['made_prompts']:,} prompts have not exactly as many tokens "
            "as asked"
        )
    if found["cut_to_length"]:
        said.append(f"{found['cut_to_length']:,} requests were cut to the length of the model")
    if found["unfinished"] or found["not_sent"]:
        said.append(
            f"interrupted: {found['unfinished']:,} requests were cut off and "
            f"{found['not_sent']:,} not sent; neither count"
        )
    return said
