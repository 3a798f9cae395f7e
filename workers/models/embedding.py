"""From token ids to the residual stream. Each tensor-parallel rank has some rows of the vocabulary."""

from __future__ import annotations

from torch import Tensor

from workers.parallel.collectives import Parallel


class Embedding:
    def __init__(self, weight: Tensor, vocab_size: int, parallel: Parallel) -> None:
        """weight [rows of this rank, hidden]."""
        self._weight, self._parallel = weight, parallel
        self._first = parallel.shard.rows_of(vocab_size).start

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> float32 [T, hidden]: the residual stream's sums over all layers are where 16 bits lose most."""
        if self._parallel.shard.whole:
            return self._weight.index_select(0, token_ids).float()
        local = token_ids - self._first
        elsewhere = (local < 0) | (local >= self._weight.shape[0])
        rows = self._weight.index_select(0, local.masked_fill(elsewhere, 0))
        # One rank has the row, the others add zeros: exact in any dtype.
        return self._parallel.all_reduce(rows.masked_fill(elsewhere[:, None], 0)).float()
