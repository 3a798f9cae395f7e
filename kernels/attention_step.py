"""What attention is told about one step, whichever kernels compute it. No triton here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionStep:
    """The S sequences of one step, flattened into T query tokens; all tensors on one device.

    Queries of sequence s are rows query_start[s]:query_start[s + 1]; the last of them is at position lengths[s] - 1. A
    captured launch has room for more than a step needs. What fills it up: sequences of no queries (query_start repeats);
    tokens of slot -1, behind the last sequence or in sequences of one token, length 1 and a table of zeros. Nothing is
    written for them, and what comes out of them is of no use.
    """

    query_start: Tensor  # int32 [S + 1], 0 first
    lengths: Tensor  # int32 [S]: tokens of context, this step's included
    block_tables: Tensor  # int32 [S, W], contiguous, padded with 0
    slots: Tensor  # int64 [T]: where a token's keys and values go; below 0: it only fills up
    max_queries: int  # of one sequence; bounds are enough, they size launches
    max_length: int

    @classmethod
    def of(
        cls,
        query_start: Sequence[int],
        lengths: Sequence[int],
        block_tables: Tensor,
        slots: Tensor,
        device: torch.device | str | None = None,
    ) -> AttentionStep:
        """From the host's numbers, with the least bounds. `device`: None for that of `block_tables`."""
        device = block_tables.device if device is None else device
        counts = [b - a for a, b in itertools.pairwise(query_start)]
        return cls(
            torch.tensor(query_start, dtype=torch.int32, device=device),
            torch.tensor(lengths, dtype=torch.int32, device=device),
            block_tables.to(device, torch.int32).contiguous(),
            slots.to(device, torch.int64),
            max(counts, default=0),
            max(lengths, default=0),
        )


@dataclass(frozen=True, eq=False)
class HeadNorms:
    """RMS norms of queries and keys before the rotation: of each head, weights [D], or of all heads together, [heads * D]."""

    q: Tensor
    k: Tensor
    eps: float
