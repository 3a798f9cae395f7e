"""What becomes of a placement when ranks are missing: decided by the ranks themselves, for the router may be away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from workers.protocol.experts import LayerExperts, Placement, PlacementError


def over_members(placement: Placement, num_experts: int, members: Sequence[int], slots: int) -> Placement:
    """The same placement with nothing on other ranks than `members`; it keeps its version.

    What only the missing held goes to the members with the fewest experts of that layer, so that few are loaded and
    nothing else moves. Where a member is full, copies that others have too make room. The result depends on nothing
    but the arguments. Raises PlacementError when `slots` per layer and member do not suffice.
    """
    if not members:
        raise PlacementError("no rank is left")
    layers = []
    for layer, ranks in enumerate(placement.layers):
        try:
            layers.append(_layer(ranks, num_experts, members, slots))
        except PlacementError as error:
            raise PlacementError(f"layer {layer}: {error}") from None
    kept = tuple(layers) == placement.layers
    return Placement(placement.version, tuple(layers), placement.shares if kept else None)


def _layer(ranks: LayerExperts, num_experts: int, members: Sequence[int], slots: int) -> LayerExperts:
    held = {rank: list(ranks[rank]) for rank in members}
    count = Counter(expert for experts in held.values() for expert in experts)
    orphans = [expert for expert in range(num_experts) if not count[expert]]
    for expert in orphans:
        rank = min(members, key=lambda rank: (len(held[rank]), rank))
        if len(held[rank]) >= slots:
            rank = _make_room(held, count, num_experts, members, slots)
        held[rank].append(expert)
        count[expert] = 1
    return tuple(tuple(held.get(rank, ())) for rank in range(len(ranks)))


def _make_room(
    held: dict[int, list[int]], count: Counter[int], num_experts: int, members: Sequence[int], slots: int
) -> int:
    """Give up the copy of which there are most; the rank that now has a free slot."""
    spare = [(-count[expert], rank, expert) for rank in members for expert in held[rank] if count[expert] > 1]
    if not spare:
        raise PlacementError(
            f"{num_experts} experts do not fit on ranks {', '.join(map(str, members))}, whose memory holds {slots} each"
        )
    _, rank, expert = min(spare)
    held[rank].remove(expert)
    count[expert] -= 1
    return rank
