"""Paged attention: what every layer of an iteration shares, and one layer's attention.

All index tensors are built once per iteration and shifted by a constant per layer. Decode rows go
through one batched call, with the query heads of a KV head as the rows of a matrix; prefill rows
go one by one, since few run at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastserve.worker.model.batch import Batch
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.kv_cache import KvCache


class _Decodes:
    """Rows with one new token: their padded block tables and mask."""

    def __init__(
        self, batch: Batch, rows: list[int], starts: list[int], kv: KvCache, window: int | None
    ) -> None:
        device = kv.data.device
        lens = torch.tensor([batch.context_lens[row] for row in rows])
        blocks = -(-int(lens.max()) // kv.block_size)
        # Padding reads block 0; the mask hides it.
        tables = [(batch.block_tables[row][:blocks] + [0] * blocks)[:blocks] for row in rows]
        positions = torch.arange(blocks * kv.block_size)
        hidden = positions >= lens[:, None]
        if window is not None:
            hidden |= positions < lens[:, None] - window
        mask = torch.zeros(hidden.shape, dtype=kv.data.dtype)
        mask.masked_fill_(hidden, float("-inf"))
        self.tokens = torch.tensor([starts[row] for row in rows], device=device)
        self.mask = mask[:, None, None, :].to(device)  # [R, 1, 1, S]
        self.pages = _page_index(torch.tensor(tables), kv).to(device)  # [R, kv heads, blocks]


class _Prefill:
    """One row with several new tokens."""

    def __init__(self, batch: Batch, row: int, start: int, kv: KvCache, window: int | None) -> None:
        device = kv.data.device
        self.context = batch.context_lens[row]
        self.first, self.count = start, batch.query_lens[row]
        blocks = -(-self.context // kv.block_size)
        table = torch.tensor([batch.block_tables[row][:blocks]])
        self.pages = _page_index(table, kv).to(device)  # [1, kv heads, blocks]
        self.causal = self.count == self.context and window is None
        self.mask: torch.Tensor | None = None
        if not self.causal:
            keys = torch.arange(self.context)
            queries = torch.arange(self.context - self.count, self.context)[:, None]
            seen = keys <= queries
            if window is not None:
                seen &= keys > queries - window
            self.mask = seen.to(device)  # [count, context]


def _page_index(tables: torch.Tensor, kv: KvCache) -> torch.Tensor:
    """Block tables [R, B] -> indexes [R, kv heads, B] of layer 0's K pages in `kv` seen as
    [pages, block_size, head_dim]."""
    _, layers, _, heads, _, _ = kv.data.shape
    return tables[:, None, :] * (layers * 2 * heads) + torch.arange(heads)[:, None]


class PagedAttention:
    """The attention of one iteration, for all layers in turn."""

    def __init__(self, batch: Batch, kv: KvCache, config: ModelConfig) -> None:
        self._heads, self._kv_heads, self._dim = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self._kv = kv
        self._pages = kv.data.view(-1, kv.block_size, config.head_dim)
        self._slots = kv.data.view(-1, config.head_dim)
        starts = [0]
        for count in batch.query_lens:
            starts.append(starts[-1] + count)
        positions: list[int] = []
        places: list[int] = []  # flat token slots: block * block_size + offset
        for row, count in enumerate(batch.query_lens):
            table, end = batch.block_tables[row], batch.context_lens[row]
            for position in range(end - count, end):
                block, offset = divmod(position, kv.block_size)
                positions.append(position)
                places.append(table[block] * kv.block_size + offset)
        device = kv.data.device
        self.positions = torch.tensor(positions, device=device)
        self._write = self._write_index(torch.tensor(places)).to(device)
        window = config.sliding_window
        decodes = [row for row, count in enumerate(batch.query_lens) if count == 1]
        self._decodes = _Decodes(batch, decodes, starts, kv, window) if decodes else None
        self._prefills = [
            _Prefill(batch, row, starts[row], kv, window)
            for row, count in enumerate(batch.query_lens)
            if count > 1
        ]
        ends = [starts[row + 1] - 1 for row in batch.logit_rows]
        self.logit_tokens = torch.tensor(ends, device=device, dtype=torch.long)

    def _write_index(self, places: torch.Tensor) -> torch.Tensor:
        """Token slots [T] -> indexes [T * kv heads] of layer 0's K in `kv` seen as
        [tokens, head_dim]."""
        _, layers, _, heads, size, _ = self._kv.data.shape
        block, offset = places // size, places % size
        pages = block[:, None] * (layers * 2 * heads) + torch.arange(heads)
        return (pages * size + offset[:, None]).flatten()

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q [T, heads, dim], k and v [T, kv heads, dim] -> [T, heads * dim].

        Writes k and v into the cache first; each row then attends to its whole context there.
        """
        to_k = layer * 2 * self._kv_heads
        to_v = to_k + self._kv_heads
        size = self._kv.block_size
        self._slots.index_copy_(0, self._write + to_k * size, k.reshape(-1, self._dim))
        self._slots.index_copy_(0, self._write + to_v * size, v.reshape(-1, self._dim))
        group = self._heads // self._kv_heads
        out = torch.empty(q.shape[0], self._heads * self._dim, dtype=q.dtype, device=q.device)
        if self._decodes is not None:
            rows = self._decodes
            queries = q[rows.tokens] if self._prefills else q
            attended = F.scaled_dot_product_attention(
                queries.reshape(-1, self._kv_heads, group, self._dim),
                self._gather(rows.pages, to_k),
                self._gather(rows.pages, to_v),
                attn_mask=rows.mask,
            )
            out[rows.tokens] = attended.reshape(-1, self._heads * self._dim)
        for row in self._prefills:
            span = slice(row.first, row.first + row.count)
            keys = self._gather(row.pages, to_k)[:, :, : row.context]
            values = self._gather(row.pages, to_v)[:, :, : row.context]
            attended = F.scaled_dot_product_attention(
                q[span].transpose(0, 1)[None],
                keys.repeat_interleave(group, dim=1),
                values.repeat_interleave(group, dim=1),
                attn_mask=row.mask,
                is_causal=row.causal,
            )
            out[span] = attended[0].transpose(0, 1).reshape(row.count, -1)
        return out

    def _gather(self, pages: torch.Tensor, shift: int) -> torch.Tensor:
        """Copy pages [R, kv heads, B] into [R, kv heads, B * block_size, dim]."""
        rows, heads, blocks = pages.shape
        found = self._pages.index_select(0, (pages + shift).flatten())
        return found.view(rows, heads, blocks * self._kv.block_size, self._dim)
