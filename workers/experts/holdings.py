"""The experts whose weights this rank holds, and how it comes to hold others while it computes with these.

Layers are made ready one after another, in order, and may be switched to as soon as all ranks have them: what is left
behind there makes room for the next ones. So memory is bounded, however much a new placement moves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from workers.experts.parallel import Compute

logger = logging.getLogger(__name__)

_RETRY_S = 1.0


class Source(Protocol):
    """Where weights come from, and who computes with them."""

    def load(self, layer: int, expert: int) -> Any:
        """Weights as `install` takes them. From any thread."""

    def num_bytes(self) -> int:
        """Of one expert of one layer, as it is held."""

    def install(self, layer: int, weights: Sequence[Any]) -> Compute:
        """What computes with these, by slot, from the next step on. Between two steps, on the engine's thread."""


class Holdings:
    def __init__(self, num_layers: int, source: Source, capacity: int, on_ready: Callable[[], None]) -> None:
        """`capacity`: experts of all layers together. `on_ready` comes on another thread."""
        self._source, self._capacity, self._on_ready = source, capacity, on_ready
        self._held: list[dict[int, Any]] = [{} for _ in range(num_layers)]
        self._used: list[tuple[int, ...]] = [()] * num_layers  # by slot, what is computed with
        self._wanted: list[tuple[int, ...]] = [()] * num_layers
        self.ready = num_layers  # leading layers of what is wanted that are all here
        self.expert_bytes = source.num_bytes()
        self.most_held = 0  # experts at a time
        self.bytes_per_s = 0.0  # at which experts were loaded lately
        self._changed = threading.Condition()
        self._settling = False
        self._closing = False
        threading.Thread(target=self._run, name="experts-loader", daemon=True).start()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def settle(self, used: Sequence[tuple[int, ...]]) -> None:
        """Hold exactly these, now: no step runs meanwhile. Raises what the source raises."""
        with self._changed:
            self._settling = True  # one of two loads
            self._used = list(used)
            self._want(used)
        try:
            for layer, experts in enumerate(used):
                for expert in experts:
                    if expert not in self._held[layer]:
                        self._load(layer, expert)
        finally:
            with self._changed:
                self._settling, self.ready = False, self._leading()
                self._changed.notify_all()

    def aim(self, wanted: Sequence[tuple[int, ...]]) -> None:
        """Load what is lacking for these while what is used stays."""
        with self._changed:
            self._want(wanted)

    def use(self, layer: int, experts: tuple[int, ...]) -> None:
        """From the next step on; they are here. What nobody wants any more goes."""
        with self._changed:
            self._used[layer] = experts
            self._drop(layer)
            self._changed.notify_all()

    def weights(self, layer: int, expert: int) -> Any | None:
        return self._held[layer].get(expert)

    def install(self, layer: int) -> Compute:
        return self._source.install(layer, [self._held[layer][expert] for expert in self._used[layer]])

    def num_held(self) -> int:
        return sum(map(len, self._held))

    # --- under the lock ---------------------------------------------------------------------------------------------

    def _want(self, wanted: Sequence[tuple[int, ...]]) -> None:
        self._wanted = list(wanted)
        for layer in range(len(self._held)):
            self._drop(layer)
        self.ready = self._leading()
        self._changed.notify_all()

    def _drop(self, layer: int) -> None:
        held = self._held[layer]
        for expert in set(held).difference(self._used[layer], self._wanted[layer]):
            del held[expert]

    def _leading(self) -> int:
        for layer, experts in enumerate(self._wanted):
            if not set(experts) <= set(self._held[layer]):
                return layer
        return len(self._wanted)

    def _next(self) -> tuple[int, int] | None:
        """What to load now. None: nothing is lacking, or there is no room."""
        if self._settling or self.ready == len(self._wanted):
            return None
        missing = [expert for expert in self._wanted[self.ready] if expert not in self._held[self.ready]]
        return (self.ready, missing[0]) if self.num_held() < self._capacity else None

    # --- loading ----------------------------------------------------------------------------------------------------

    def _load(self, layer: int, expert: int) -> None:
        began = time.monotonic()
        weights = self._source.load(layer, expert)
        rate = self.expert_bytes / max(time.monotonic() - began, 1e-6)
        self.bytes_per_s += (0.2 if self.bytes_per_s else 1.0) * (rate - self.bytes_per_s)
        with self._changed:
            self._held[layer][expert] = weights
            self.most_held = max(self.most_held, self.num_held())
            self._drop(layer)  # it may have been given up meanwhile

    def _run(self) -> None:
        while True:
            with self._changed:
                while (due := self._next()) is None and not self._closing:
                    self._changed.wait()
            if self._closing or due is None:
                return
            try:
                self._load(*due)
            except Exception as error:  # noqa: BLE001 - whatever it was, the ranks go on with what they have
                logger.warning("expert %d of layer %d could not be loaded: %s", due[1], due[0], error)
                time.sleep(_RETRY_S)
                continue
            with self._changed:
                before, self.ready = self.ready, self._leading()
            if self.ready > before:
                self._on_ready()
