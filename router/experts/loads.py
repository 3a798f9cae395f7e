"""The load of a group's experts, put together from what its ranks count.

Each rank numbers its messages. One that comes twice is taken once, one that is lost is missed and counted, and a rank
that was restarted begins anew. Nothing here grows: the shapes are the group's, time is kept in a few windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.experts.windows import Array, Windows
from workers.protocol.expert_messages import COUNT_BYTES, ExpertCounts


class CountsError(ValueError):
    """The message says whose counts can't be used and why."""


@dataclass(frozen=True, slots=True)
class _Heard:
    epoch: int
    seq: int


class Loads:
    """Of one group: `layers` with `experts` logical experts each, on `ranks` ranks. `now` is time.monotonic()."""

    def __init__(
        self, layers: int, experts: int, ranks: int, *, window_s: float, half_life_s: float, enough: int
    ) -> None:
        self.layers = layers
        self.experts = experts
        self.ranks = ranks
        self.lost = 0  # messages
        self.repeated = 0
        self.heard_at: float | None = None
        self.tokens = [0] * ranks  # computed by each rank, over all layers, since this object was made
        self._windows = Windows(
            layers, experts, ranks, window_s=window_s, half_life_s=half_life_s, enough=enough
        )
        self._heard: list[_Heard | None] = [None] * ranks
        self._version = -1  # of the placement that `computed` is about

    def take(self, counts: ExpertCounts, now: float) -> bool:
        """False: it came before, or is of an earlier life. Raises CountsError."""
        routed, computed = self._decoded(counts)
        if not self._is_new(counts):
            return False
        window = self._windows.at(now)
        # Which half must not depend on the time of day or the rank: messages of each rank go to either in turn.
        window.routed[counts.seq % 2] += routed
        window.seconds[counts.rank] += counts.seconds
        window.expert_s[counts.rank] += counts.expert_s
        by_layer = computed.sum(axis=1, dtype=np.int64)
        if counts.version == self._version:
            window.computed[:, counts.rank] += by_layer
        self.tokens[counts.rank] += int(by_layer.sum())
        self.heard_at = now
        return True

    def placed(self, version: int) -> None:
        """The ranks compute with this placement now: what each computed before says nothing of it."""
        if version != self._version:
            self._version = version
            self._windows.forget_computed()

    def halves(self) -> Array:
        """[2, layers, experts]: tokens sent to each expert, in two independent halves of the messages."""
        return self._windows.total(lambda window: window.routed)

    def routed(self) -> Array:
        """[layers, experts]: tokens sent to each expert, those of long ago less by their age."""
        return np.asarray(self.halves().sum(axis=0))

    def computed(self) -> Array:
        """[layers, ranks]: tokens that each rank computed with the placement that was named to `placed` last."""
        return self._windows.total(lambda window: window.computed)

    def expert_share(self) -> float | None:
        """Of a rank's time, the part spent in experts, on the rank where it is largest. None: not measured."""
        seconds = self._windows.total(lambda window: window.seconds)
        spent = self._windows.total(lambda window: window.expert_s)
        if not spent.any():
            return None
        return float(min(np.max(spent / np.where(seconds > 0, seconds, np.inf)), 1.0))

    @property
    def changes(self) -> int:
        """How often the load has changed for good, and what was counted before was dropped."""
        return self._windows.changes

    def _is_new(self, counts: ExpertCounts) -> bool:
        last = self._heard[counts.rank]
        if last is not None:
            if (counts.epoch, counts.seq) <= (last.epoch, last.seq):
                self.repeated += 1
                return False
            if counts.epoch == last.epoch:
                self.lost += counts.seq - last.seq - 1
        self._heard[counts.rank] = _Heard(counts.epoch, counts.seq)
        return True

    def _decoded(self, counts: ExpertCounts) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        who = f"rank {counts.rank} ({counts.worker_id}) of group {counts.group}"
        if not 0 <= counts.rank < self.ranks:
            raise CountsError(f"{who}: the group has ranks 0 to {self.ranks - 1}")
        if len(counts.routed) != self.layers * self.experts * COUNT_BYTES:
            raise CountsError(
                f"{who}: `routed` has {len(counts.routed)} bytes; {self.layers} layers of {self.experts} experts "
                f"take {self.layers * self.experts * COUNT_BYTES}"
            )
        if len(counts.computed) % (self.layers * COUNT_BYTES):
            raise CountsError(
                f"{who}: `computed` has {len(counts.computed)} bytes, which {self.layers} layers can't share evenly"
            )
        routed = np.frombuffer(counts.routed, "<u4").reshape(self.layers, self.experts)
        return routed, np.frombuffer(counts.computed, "<u4").reshape(self.layers, -1)
