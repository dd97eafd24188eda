"""Reports for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastserve.bench.load.report import LATENCIES, Report, warnings
from fastserve.bench.report import STATISTICS, seconds


def level_of(found: Report) -> str:
    """The rate or the number of clients of a run, in words."""
    if found["concurrency"] is not None:
        clients = found["concurrency"]
        return f"{clients:,} client{'s' * (clients > 1)}"
    return "as recorded" if found["rate"] is None else f"{found['rate']:g} requests/s"


def one(found: Report) -> Group:
    """A single run: latencies in a table, the rest below it."""
    title = (
        f"{found['model']}, {found['workload']}, {level_of(found)}, "
        f"{found['requests']:,} requests, seed {found['seed']}"
    )
    shown = Table()
    shown.add_column("seconds")
    for name in STATISTICS:
        shown.add_column(name.upper() if name != "mean" else name, justify="right")
    for key, words in LATENCIES.items():
        shown.add_row(words, *(seconds(found[key][name]) for name in STATISTICS))
    return Group(Text(title, style="bold"), shown, Text(_rest(found)))


def _rest(found: Report) -> str:
    lines = [
        f"output              {found['output_tokens']:,} tokens, "
        f"{found['output_tokens_per_s']:,.1f} tokens/s",
        f"prompts             {found['prompt_tokens']:,} tokens, "
        f"{found['prompt_tokens_per_s']:,.1f} tokens/s; {found['prompt_lengths']}",
        f"complete            {found['requests'] - found['failed']:,} of {found['requests']:,}, "
        f"{found['requests_per_s']:,.2f} requests/s",
        f"time                {found['makespan_s']:,.1f} s",
    ]
    if found["goodput_per_s"] is not None:
        lines.append(f"goodput             {_goodput(found)}")
    client = found["client"]
    lines.append(
        f"client              left late P99 {client['late_p99_s'] * 1e3:.1f} ms, "
        f"stalls P99 {client['stall_p99_s'] * 1e3:.1f} ms, CPU {client['cpu']:.0%} of a core"
    )
    lines += [f"failed              {count:,} x {error}" for error, count in _errors(found)]
    lines += [f"! {said}" for said in warnings(found)]
    return "\n".join(lines)


def _goodput(found: Report) -> str:
    limits = [
        f"{words} {found[key]:g} s"
        for key, words in (("slo_ttft_s", "TTFT"), ("slo_tpot_s", "TPOT"))
        if found[key] is not None
    ]
    attained = found["slo_attainment"] or 0.0
    return f"{found['goodput_per_s']:,.2f} requests/s: {attained:.1%} within {' and '.join(limits)}"


def _errors(found: Report) -> list[tuple[str, int]]:
    return list(found["errors"].items())[:5]


def several(reports: Sequence[Report]) -> Group:
    """A line per run."""
    first = reports[0]
    title = (
        f"{first['model']}, {first['workload']}, {first['requests']:,} requests a run, "
        f"seed {first['seed']}; seconds"
    )
    closed = first["concurrency"] is not None
    goodput = first["goodput_per_s"] is not None
    columns = ["TTFT P50", "P99", "TPOT P50", "P99", "ITL P99", "per token", "e2e P50", "P99"]
    columns += ["tokens/s", "requests/s", *(["goodput"] if goodput else []), "failed"]
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for words in ("clients" if closed else "due per s", *columns):
        shown.add_column(words, justify="right", no_wrap=True)
    for found in reports:
        level = found["concurrency"] if closed else found["rate"]
        shown.add_row(
            "recorded" if level is None else f"{level:g}",
            *(seconds(found["ttft_s"][name]) for name in ("p50", "p99")),
            *(seconds(found["tpot_s"][name]) for name in ("p50", "p99")),
            seconds(found["itl_s"]["p99"]),
            seconds(found["per_token_s"]["mean"]),
            *(seconds(found["e2e_s"][name]) for name in ("p50", "p99")),
            f"{found['output_tokens_per_s']:,.0f}",
            f"{found['requests_per_s']:,.2f}",
            *([f"{found['goodput_per_s']:,.2f}"] if goodput else []),
            f"{found['failed']:,}",
        )
    said = [f"! {level_of(found)}: {words}" for found in reports for words in warnings(found)]
    return Group(Text(title, style="bold"), shown, Text("\n".join(said)))
