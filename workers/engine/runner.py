"""Carries out a step: tensors in, one forward pass, tokens out. Owns the weights' use and the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kernels.attention_step import AttentionStep
from kernels.cpu.decoder import StepArrays
from workers.device_memory import DevicePages, exportable_pages
from workers.engine.pending import Ready
from workers.engine.plan import Sampled
from workers.engine.sampler import Sampler
from workers.engine.step_input import StepInput
from workers.models.decoder import Decoder
from workers.models.sharding import rank_layout
from workers.protocol.messages import KvLayout
from workers.shared_memory import SharedPages


class TorchRunner:
    kernels = "torch"
    overlaps = False

    def __init__(
        self, model: Decoder, sampler: Sampler, layout: KvLayout, num_blocks: int, share_kv: bool = False
    ) -> None:
        self.model = model
        self.device = model.device
        self.layout = layout
        self.weights = str(model.dtype).removeprefix("torch.")
        self._sampler = sampler
        num_bytes = num_blocks * rank_layout(layout, model.shard).block_bytes
        self.shared = shared_pages(num_bytes, model.device) if share_kv else None
        pages = None if self.shared is None else self.shared.tensor
        self.kv_cache = model.new_kv_cache(num_blocks, layout.block_size, pages)

    def watch_next(self) -> None:
        return None

    def submit(self, step: StepInput) -> Ready:
        return Ready(self.run(step))

    @torch.inference_mode()
    def run(self, step: StepInput) -> list[Sampled]:
        """One entry for each of `step.samples`: of none on tensor-parallel ranks behind the first."""
        inputs = StepTensors.of(step.arrays, self.layout.block_size, self.device)
        hidden = self.model.forward(
            inputs.token_ids, inputs.positions, self.kv_cache, inputs.attention, inputs.rows
        )
        if not len(step.arrays.rows):
            return []
        logits = self.model.logits(hidden)  # by all ranks together
        return self._sampler(logits, step.samples) if step.samples else []


@dataclass(frozen=True)
class StepTensors:
    """A step's arrays on the device. What is no part of `attention` is int64."""

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    attention: AttentionStep
    rows: torch.Tensor  # [R], at least one: a chunk that samples nothing still ends in a row

    @staticmethod
    def of(arrays: StepArrays, block_size: int, device: torch.device) -> StepTensors:
        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.int64).to(device)

        attention = AttentionStep.of(
            arrays.query_start.tolist(),
            arrays.lengths.tolist(),
            tensor(_padded_tables(arrays, block_size)),
            tensor(arrays.slots),
        )
        rows = tensor(arrays.rows if len(arrays.rows) else np.zeros(1))
        return StepTensors(tensor(arrays.token_ids), tensor(arrays.positions), attention, rows)


def shared_pages(num_bytes: int, device: torch.device) -> SharedPages | DevicePages | None:
    """Memory that other processes of the host can map or open."""
    if device.type == "cpu":
        return SharedPages(num_bytes)
    return exportable_pages(num_bytes, device) if device.type == "cuda" else None


def _padded_tables(arrays: StepArrays, block_size: int) -> np.ndarray:
    """[S, most blocks of a sequence]: the blocks that hold its context, then zeros."""
    counts = -(-arrays.lengths // block_size)
    padded = np.zeros((len(counts), counts.max()), dtype=np.int64)
    for row, (start, count) in enumerate(zip(arrays.block_start, counts, strict=True)):
        padded[row, :count] = arrays.blocks[start : start + count]
    return padded
