"""From the placement that is computed with to another, layer after layer: the same decisions on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from workers.protocol.experts import LayerExperts, LayerShares, Placement, PlacementError


class Switch:
    """The first `done` layers of `now` are as in `aim`. Ranks that are told the same in the same order agree."""

    def __init__(self, now: Placement) -> None:
        self.now = self.aim = now
        self.done = now.num_layers

    def towards(self, aim: Placement) -> None:
        self.aim, self.done = aim, 0

    def advance(self, ready: int) -> list[int]:
        """All ranks hold the first `ready` layers of the aim. The layers that are used otherwise from here on."""
        if ready <= self.done:
            return []
        layers = range(self.done, ready)
        changed = [layer for layer in layers if _parts(self.now, layer) != _parts(self.aim, layer)]
        self.now, self.done = _mixed(self.now, self.aim, ready), ready
        return changed

    @property
    def ended(self) -> bool:
        return self.done == self.aim.num_layers

    def check_room(self, aim: Placement, ranks: Sequence[int], capacity: int) -> None:
        """Raises PlacementError when one of the ranks, which holds `capacity` experts of all layers, can't come to it."""
        for rank in ranks:
            now, then = (of_rank(placement, rank) for placement in (self.now, aim))
            if lack := _lack_of_room(now, then, capacity):
                raise PlacementError(f"rank {rank}: {lack}")


def of_rank(placement: Placement, rank: int) -> list[tuple[int, ...]]:
    """[layer][slot]"""
    return [ranks[rank] for ranks in placement.layers]


def _lack_of_room(now: Sequence[Sequence[int]], aim: Sequence[Sequence[int]], capacity: int) -> str | None:
    held = sum(map(len, now))
    for layer, (old, new) in enumerate(zip(now, aim, strict=True)):
        lacking = len(set(new).difference(old))
        if held + lacking > capacity:
            return (
                f"layer {layer} brings {lacking} experts beside {held}, its memory holds {capacity} "
                "(experts.slots in each layer and experts.staging)"
            )
        held += len(new) - len(old)
    return None


def _parts(placement: Placement, layer: int) -> tuple[LayerExperts, LayerShares | None]:
    return placement.layers[layer], None if placement.shares is None else placement.shares[layer]


def _mixed(now: Placement, aim: Placement, ready: int) -> Placement:
    """The first layers as in `aim`, the others as they are. It has the version of `aim` when all are."""
    if ready == aim.num_layers:
        return aim
    shares = None
    if now.shares is not None or aim.shares is not None:
        parts = [_shares(aim if layer < ready else now, layer) for layer in range(aim.num_layers)]
        shares = tuple(parts)
    return Placement(now.version, aim.layers[:ready] + now.layers[ready:], shares)


def _shares(placement: Placement, layer: int) -> LayerShares:
    if placement.shares is not None:
        return placement.shares[layer]
    count = Counter(expert for experts in placement.layers[layer] for expert in experts)
    return tuple(tuple(1 / count[expert] for expert in experts) for experts in placement.layers[layer])
