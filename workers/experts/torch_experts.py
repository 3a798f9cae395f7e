"""The routed experts of a torch decoder, as a group places them: MakeExperts of workers/models/moe.py, and their source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.quantized_matrix import Weight
from kernels.reference_moe import grouped_mlp
from workers.experts.counts import Counted, Counts
from workers.experts.exchange import Exchange
from workers.experts.parallel import Compute, ParallelExperts, Ranks, Route
from workers.models.layer_weights import Mlp, SparseMlp
from workers.models.moe import activation_of, float_expert
from workers.models.ops import Ops
from workers.models.spec import DecoderSpec, MoeSpec

Expert = Mlp[Tensor]


class TorchExperts:
    """Reads no expert before a placement asks for it."""

    def __init__(
        self, moe: MoeSpec, hidden: int, dtype: torch.dtype, device: torch.device, slots: int
    ) -> None:
        """`slots`: of a layer on this rank."""
        self._moe, self._hidden, self._like = moe, hidden, torch.empty(0, dtype=dtype, device=device)
        self._activation = activation_of(moe)
        self._read: list[Callable[[int], Expert]] = []  # by layer with experts
        self._layers: list[ParallelExperts] = []
        self._counts = Counts(sum(moe.layers), moe.num_experts, slots)
        self.ranks: Ranks  # given before the first step

    # --- for the decoder --------------------------------------------------------------------------------------------

    def make(self, index: int, spec: DecoderSpec, weights: SparseMlp[Weight], ops: Ops) -> ParallelExperts:
        assert index == len(self._read), "layers come in order"
        self._read.append(lambda logical: float_expert(weights.expert(logical)))
        self._layers.append(ParallelExperts(index, self._moe.top_k, self._hidden, self, self._counts))
        return self._layers[-1]

    @torch.inference_mode()
    def idle(self) -> None:
        for layer in self._layers:
            layer.idle(self._like)

    @property
    def exchange(self) -> Exchange:
        return self.ranks.exchange

    def route(self, layer: int) -> Route:
        return self.ranks.route(layer)

    def take_counts(self) -> Counted:
        return self._counts.take()

    # --- for the group ----------------------------------------------------------------------------------------------

    def load(self, layer: int, expert: int) -> Expert:
        return self._read[layer](expert)

    def num_bytes(self) -> int:
        inner, biases = self._moe.intermediate_size, 0
        if self._moe.expert_bias:
            biases = 2 * inner + self._hidden
        return (3 * inner * self._hidden + biases) * self._like.element_size()

    def install(self, layer: int, weights: Sequence[Expert]) -> Compute:
        gate_up: Any = [expert.gate_up for expert in weights]  # looked up by expert, as a stacked tensor is
        down: Any = [expert.down for expert in weights]
        biases: Any = None
        if self._moe.expert_bias:
            biases = [expert.gate_up_bias for expert in weights], [expert.down_bias for expert in weights]

        def compute(x: Tensor, by_slot: NDArray[np.int64]) -> Tensor:
            return grouped_mlp(x, torch.from_numpy(by_slot), gate_up, down, biases, self._activation)

        return compute

    def arrays(self, weights: Expert) -> list[NDArray[np.uint8]]:
        parts = (weights.gate_up, weights.gate_up_bias, weights.down, weights.down_bias)
        return [
            part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            for part in parts
            if part is not None
        ]

    def from_bytes(self, data: NDArray[np.uint8]) -> Expert:
        inner, hidden, bias = self._moe.intermediate_size, self._hidden, self._moe.expert_bias
        shapes = [(2 * inner, hidden), (2 * inner,), (hidden, inner), (hidden,)]
        values = torch.from_numpy(data).view(self._like.dtype)
        parts: list[Tensor | None] = []
        for shape in shapes:
            if len(shape) == 1 and not bias:
                parts.append(None)
                continue
            size = shape[0] * (shape[1] if len(shape) == 2 else 1)
            parts.append(values[:size].view(shape).to(self._like.device))
            values = values[size:]
        gate_up, gate_up_bias, down, down_bias = parts
        assert gate_up is not None
        assert down is not None
        return Mlp(gate_up, gate_up_bias, down, down_bias)
