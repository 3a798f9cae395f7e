"""A prompt's chunk against the paged KV cache, in eager torch, and what every part of a step's attention is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.reference_rows import CacheRows

# Query tokens of a prefill tile: enough rows for the matmul, few enough to skip most hidden keys.
QUERY_TILE = 128


@dataclass(frozen=True)
class Scores:
    """How scores are made and what weighs them, in one layer."""

    scale: float
    sinks: Tensor | None  # [num_kv_heads, group]
    softcap: float | None


@dataclass(frozen=True)
class LayerRows:
    """Keys and values of one layer."""

    rows: CacheRows
    first: int  # its first tile

    def gather(self, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        return self.rows.gather(self.first, tiles, dtype)


def capped(products: Tensor, scale: float, softcap: float) -> Tensor:
    """softcap * tanh(products * scale / softcap), in place."""
    return products.mul_(scale / softcap).tanh_().mul_(softcap)


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the last dimension of [..., keys]; with `sinks` [...] as one more key, whose share is then left out."""
    if sinks is None:
        return scores.softmax(-1)
    return torch.cat((scores, sinks.unsqueeze(-1)), -1).softmax(-1)[..., :-1]


@dataclass(frozen=True)
class Tile:
    """Query tokens [start, end) of a chunk, the keys [first, last) they can see, and what is hidden among these."""

    start: int
    end: int
    first: int
    last: int
    causal: Tensor | None  # [n, 1, n], added to the last n keys
    expired: Tensor | None  # [n, 1, n], added to the first n keys: out of the window


def tiles_of(position: int, count: int, window: tuple[int, int] | None, q: Tensor) -> list[Tile]:
    """`position` of the first query and the window's (size, first key) are counted from the first gathered key."""
    triangle = torch.full((QUERY_TILE, QUERY_TILE), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    tiles = []
    for start in range(0, count, QUERY_TILE):
        n = min(QUERY_TILE, count - start)
        last = position + start + n
        causal = triangle[:n, None, :n] if n > 1 else None
        if window is None:
            tiles.append(Tile(start, start + n, 0, last, causal, None))
            continue
        size, floor = window
        first = max(floor, position + start - size + 1)
        # Query r of the tile sees keys from position + start + r - size + 1 on.
        row, key = torch.arange(n, device=q.device)[:, None], torch.arange(n, device=q.device)
        hidden = key < position + start + row - size + 1 - first
        expired = None
        if bool(hidden.any()):
            expired = torch.zeros((n, n), dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)[
                :, None
            ]
        tiles.append(Tile(start, start + n, first, last, causal, expired))
    return tiles


class Chunk:
    """One sequence with several query tokens."""

    def __init__(
        self, shape: tuple[int, int], start: int, end: int, gather: Tensor, tiles: list[Tile], q: Tensor
    ) -> None:
        """`shape`: planes and KV heads of the cache; `gather`: tiles of its keys and values; `q`: of the whole step."""
        self.covers_all = end - start == q.shape[0]
        self._start, self._end, self._gather, self._tiles = start, end, gather, tiles
        self._planes, self._num_kv_heads = shape
        self._no_bias = torch.zeros((1, 1, 1), dtype=q.dtype, device=q.device)

    def attend(self, q: Tensor, rows: LayerRows, how: Scores) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.attend_into(out, q, rows, how)
        return out

    def attend_into(self, out: Tensor, q: Tensor, rows: LayerRows, how: Scores) -> None:
        heads, (_, num_heads, dim) = self._num_kv_heads, q.shape
        group = num_heads // heads
        planes = rows.gather(self._gather, q.dtype).view(self._planes, heads, -1, dim)
        k, v = planes[0], planes[-1]
        # [heads, tokens * group, D]: the rows of one tile stay together under every KV head
        queries = q[self._start : self._end].reshape(-1, heads, group * dim).transpose(0, 1)
        queries = queries.reshape(heads, -1, dim)
        for tile in self._tiles:
            n = tile.end - tile.start
            of_tile = queries[:, tile.start * group : tile.end * group]
            keys = k[:, tile.first : tile.last].transpose(1, 2)
            if how.softcap is None:
                scores = torch.baddbmm(self._no_bias, of_tile, keys, beta=0, alpha=how.scale)
            else:
                scores = capped(torch.bmm(of_tile, keys), how.scale, how.softcap)
            by_token = scores.view(heads, n, group, -1)
            if tile.causal is not None:
                by_token[..., -n:] += tile.causal
            if tile.expired is not None:
                by_token[..., :n] += tile.expired
            # As the rows: tokens, then a token's heads.
            sinks = None if how.sinks is None else how.sinks.repeat(1, n)
            seen = torch.bmm(softmax(scores, sinks), v[:, tile.first : tile.last])
            target = out[self._start + tile.start : self._start + tile.end].view(n, heads, group * dim)
            target.copy_(seen.view(heads, n, group * dim).transpose(0, 1))
