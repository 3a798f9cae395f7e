"""From hidden states to logits.

In 16 bits a logit near 25 has a step of 0.125, so the best tokens often come out equal and argmax takes the one with
the lower id. The GEMM therefore runs in 16 bits, and the logits that decide, the best of each row, are computed once
more in float32: a fraction of the cost of a float32 head (SmolLM2 at 16 rows: 1 ms instead of 3 ms, and no second copy
of the matrix). Products beside Triton's kernels, and with quantized weights, give float32 sums as they are.

Tensor-parallel ranks have some rows of the vocabulary each; their logits are gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.quantized_matrix import Weight
from workers.models.ops import Ops, torch_ops
from workers.parallel.collectives import ALONE, Parallel

_REFINED = 64  # per row; the true best is among them unless so many lie within one rounding step of it


class Head:
    def __init__(
        self,
        weight: Weight,
        vocab_size: int | None = None,
        parallel: Parallel = ALONE,
        ops: Ops | None = None,
    ) -> None:
        """weight [vocab, hidden], or this rank's rows of it. ops: None for eager torch."""
        ops = ops or torch_ops()
        self._vocab_size, self._parallel = vocab_size or weight.shape[0], parallel
        self._weight: Tensor | None = None  # to refine with
        if isinstance(weight, Tensor) and ops.name == "torch":
            self._multiply = ops.linear(weight)
            self._weight = weight if weight.dtype != torch.float32 else None
        else:
            self._multiply = ops.linear(weight, dtype=torch.float32)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[R, hidden] after the final norm -> float32 [R, vocab]."""
        local, shard = self._of_this_rank(hidden), self._parallel.shard
        if shard.whole:
            return local
        each = shard.rows_each(self._vocab_size)  # the last ranks may have fewer rows
        gathered = self._parallel.all_gather(functional.pad(local, (0, each - local.shape[1])))
        return gathered[:, : self._vocab_size].contiguous()

    def _of_this_rank(self, hidden: Tensor) -> Tensor:
        logits = self._multiply(hidden).float()
        if self._weight is None or not len(logits):
            return logits
        best = logits.topk(min(_REFINED, logits.shape[-1]), dim=-1).indices
        rows = self._weight[best].float()  # [R, _REFINED, hidden]
        exact = torch.bmm(rows, hidden.float().unsqueeze(-1)).squeeze(-1)
        return logits.scatter_(-1, best, exact)
