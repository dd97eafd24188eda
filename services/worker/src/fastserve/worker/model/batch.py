"""One iteration's work: the tokens of all rows, and where their KV lives."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Batch:
    """R rows (one job each) with T tokens in all; prefill chunks and decodes may be mixed.

    token_ids: T token ids, row after row.
    query_lens: R counts of new tokens per row (1 for a decode).
    context_lens: R counts of tokens in the KV cache after this iteration; the new tokens of row r
        stand at positions context_lens[r] - query_lens[r] and up.
    block_tables: R lists of device blocks that hold at least context_lens[r] tokens.
    logit_rows: rows whose last token's logits are wanted, ascending.
    tops: how many of the likeliest tokens each of these needs to know, 0: all (also if empty). A
        group of ranks leaves the other logits out (-inf); one process has them anyhow.
    """

    token_ids: list[int]
    query_lens: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    logit_rows: list[int]
    tops: list[int] = field(default_factory=list)
