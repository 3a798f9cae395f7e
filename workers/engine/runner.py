"""Carries out a step: tensors in, one forward pass, tokens out. Owns the weights' use and the KV cache."""

from __future__ import annotations

import numpy as np
import torch

from kernels.reference import AttentionBatch
from workers.engine.sampler import Sampler
from workers.engine.scheduler import Sampled
from workers.engine.step_input import StepInput
from workers.models.decoder import Decoder
from workers.protocol.messages import KvLayout


class TorchRunner:
    kernels = "torch"

    def __init__(self, model: Decoder, sampler: Sampler, layout: KvLayout, num_blocks: int) -> None:
        self.model = model
        self.device = model.device
        self.layout = layout
        self._sampler = sampler
        self.kv_cache = model.new_kv_cache(num_blocks, layout.block_size)

    @torch.inference_mode()
    def run(self, step: StepInput) -> list[Sampled]:
        """One entry for each of `step.samples`."""
        batch = AttentionBatch(
            query_start=step.query_start,
            seq_lens=step.seq_lens,
            block_tables=self._tensor(_padded(step.block_tables)),
            slots=self._tensor(step.slots),
        )
        rows = self._tensor(step.sample_rows or [0])  # a chunk that samples nothing still ends in one row
        hidden = self.model.forward(
            self._tensor(step.token_ids), self._tensor(step.positions), self.kv_cache, batch, rows
        )
        if not step.samples:
            return []
        return self._sampler(self.model.logits(hidden), step.samples)

    def _tensor(self, values: list[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int64).to(self.device)


def _padded(tables: list[list[int]]) -> np.ndarray:
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = table
    return padded
