"""How many tokens went to which expert: a few additions per layer and step."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Counted:
    """Since the last time."""

    routed: NDArray[np.int64]  # [layers, experts]: own tokens, by logical expert
    computed: NDArray[np.int64]  # [layers, slots]: anybody's tokens, by the slot here that computed them
    steps: int  # with own tokens
    expert_s: float  # spent on experts


class Counts:
    """Written by the engine's thread, taken by another."""

    def __init__(self, num_layers: int, num_experts: int, slots: int) -> None:
        self._lock = threading.Lock()
        self._shapes = (num_layers, num_experts), (num_layers, slots)
        self._reset()

    def _reset(self) -> None:
        routed, computed = self._shapes
        self._routed, self._computed = np.zeros(routed, np.int64), np.zeros(computed, np.int64)
        self._steps, self._expert_s = 0, 0.0

    def routed(self, layer: int, experts: NDArray[np.int64]) -> None:
        """Logical experts of the step's own tokens, in any shape."""
        with self._lock:
            self._steps += layer == 0 and experts.size > 0
            self._routed[layer] += np.bincount(experts.reshape(-1), minlength=self._routed.shape[1])

    def computed(self, layer: int, by_slot: NDArray[np.int64], seconds: float) -> None:
        with self._lock:
            self._computed[layer, : len(by_slot)] += by_slot
            self._expert_s += seconds

    def take(self) -> Counted:
        with self._lock:
            taken = Counted(self._routed, self._computed, self._steps, self._expert_s)
            self._reset()
        return taken
