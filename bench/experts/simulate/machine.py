"""What a decode step of an expert-parallel pool costs, by arithmetic from published figures.

A step of a layer is: attention and shared expert (the same on all ranks), dispatch, the ranks' experts, combine. All
ranks wait for the slowest one in dispatch, experts and combine. Nothing here knows of placements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Model:
    """DeepSeek-V3 (arXiv 2412.19437, table and section 4.2; config.json of deepseek-ai/DeepSeek-V3), weights in FP8."""

    layers: int = 58  # with experts, of 61
    drawn: int = 58  # of these: whose tokens are simulated, standing for all of them
    dense_layers: int = 3
    experts: int = 256
    top_k: int = 8
    hidden: int = 7168
    intermediate: int = 2048  # of an expert
    kv_bytes: int = 576 * 2  # latent and rope part of a token in a layer, bfloat16
    attention_bytes: int = 187_107_328  # weights of MLA in a layer
    dense_bytes: int = 3 * 7168 * 18432  # MLP of a layer without experts

    @property
    def each_stands_for(self) -> float:
        """Layers."""
        return self.layers / self.drawn

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.intermediate

    @property
    def expert_flop(self) -> int:
        """Of one token in one expert: two for each weight."""
        return 2 * self.expert_bytes


@dataclass(frozen=True)
class Machine:
    """H200 SXM (NVIDIA's data sheet: 4.8 TB/s, 1,979 TFLOP/s FP8 dense). All-to-all: DeepEP's README, low-latency
    kernels, EP 64, 128 tokens a rank: dispatch in FP8 173 us at 43 GB/s, combine in bfloat16 314 us at 46 GB/s."""

    memory_bytes_per_s: float = 4.8e12
    memory_efficiency: float = 0.8  # assumed: of a kernel that only reads
    flop_per_s: float = 1.979e15
    flop_efficiency: float = 0.6  # assumed: of a grouped GEMM with a few hundred tokens an expert
    dispatch_bytes_per_s: float = 43e9
    combine_bytes_per_s: float = 46e9
    network_bytes_per_s: float = 50e9  # 400 Gb/s a GPU
    overlap: float = 0.0  # share of dispatch and combine that hides behind another micro-batch's computing


@dataclass(frozen=True)
class Work:
    """Decoding: so many sequences on each rank."""

    ranks: int = 64
    batch: int = 128  # tokens of each rank in a step
    context: int = 4096  # mean, tokens


@dataclass(frozen=True)
class StepCost:
    model: Model
    machine: Machine
    work: Work

    @property
    def fixed_s(self) -> float:
        """Of a step: what does not depend on experts."""
        model, work = self.model, self.work
        rate = self.machine.memory_bytes_per_s * self.machine.memory_efficiency
        kv = work.batch * work.context * model.kv_bytes
        attention = (kv + model.attention_bytes) / rate
        shared = model.expert_bytes / rate
        dense = model.dense_bytes / rate
        return (
            (model.layers + model.dense_layers) * attention
            + model.layers * shared
            + model.dense_layers * dense
        )

    def step_s(self, tokens: Array, reads: Array, network_share: float = 1.0) -> float:
        """tokens, reads: [drawn layers, ranks], tokens that ranks compute and experts that they read for it.

        network_share: of the network that is left beside the loading of experts.
        """
        waited_for = self._experts_s(tokens, reads) + self._exchange_s(tokens, network_share)
        return self.fixed_s + waited_for * self.model.each_stands_for

    def even_s(self, slots: int) -> float:
        """If all ranks had the same to do, and each read `slots` experts."""
        shape = (self.model.drawn, self.work.ranks)
        tokens = np.full(shape, float(self.work.batch * self.model.top_k))
        return self.step_s(tokens, np.full(shape, float(slots)))

    def _experts_s(self, tokens: Array, reads: Array) -> float:
        machine, model = self.machine, self.model
        compute = tokens * (model.expert_flop / (machine.flop_per_s * machine.flop_efficiency))
        read = reads * (model.expert_bytes / (machine.memory_bytes_per_s * machine.memory_efficiency))
        return float((compute + read).max(axis=1).sum())

    def _exchange_s(self, tokens: Array, network_share: float) -> float:
        """A rank's link carries what it sends or what it receives, whichever is more."""
        machine = self.machine
        sent = self.work.batch * self.model.top_k
        most = float(np.maximum(tokens.max(axis=1), sent).sum())
        dispatch = most * self.model.hidden / machine.dispatch_bytes_per_s
        combine = most * self.model.hidden * 2 / machine.combine_bytes_per_s
        return (dispatch + combine) / network_share * (1 - machine.overlap)
