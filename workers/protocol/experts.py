"""Where the routed experts of a model live when they are spread over the ranks of an expert-parallel group.

A *logical* expert is one of the model's own; a *physical* expert is a copy of one in a slot of a rank. The router
plans placements (`router.experts`), the workers load what they lack and switch between two steps (`workers.experts`).
Layers are the model's MoE layers in order, counted from 0; ranks are those of the group, and keep their numbers
when one of them dies (it then holds nothing).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from msgspec import Struct

LayerExperts = tuple[tuple[int, ...], ...]  # [rank][slot] -> logical expert
LayerShares = tuple[tuple[float, ...], ...]  # [rank][slot] -> share of that expert's tokens
_SUM_TOLERANCE = 1e-6  # of the shares of one expert, which are decimal or binary fractions of 1


class PlacementError(ValueError):
    """The message says which layer, rank or expert, what came and what is allowed."""


class Copy(Struct, frozen=True):
    """One physical expert."""

    rank: int
    slot: int  # among those of this layer on this rank
    share: float  # of its logical expert's tokens, 0 to 1


class Move(Struct, frozen=True, order=True):
    """A rank has to load an expert that it does not hold."""

    layer: int
    rank: int
    expert: int


class Placement(Struct, frozen=True, omit_defaults=True):
    """Which logical experts each rank holds, for every layer.

    Copies of one expert share its tokens: equally, or by `shares` where given, which has the shape of `layers` and
    sums to 1 over the copies of each expert. Ranks of unequal speed need unequal shares.
    """

    version: int  # grows with every placement that is published for a group
    layers: tuple[LayerExperts, ...]  # [layer][rank][slot] -> logical expert
    shares: tuple[LayerShares, ...] | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_ranks(self) -> int:
        return len(self.layers[0]) if self.layers else 0

    def copies(self, layer: int, num_experts: int) -> list[list[Copy]]:
        """For each logical expert its copies, by rank. An expert without a copy has an empty list."""
        count = Counter(expert for rank in self.layers[layer] for expert in rank)
        found: list[list[Copy]] = [[] for _ in range(num_experts)]
        for rank, experts in enumerate(self.layers[layer]):
            for slot, expert in enumerate(experts):
                share = 1 / count[expert] if self.shares is None else self.shares[layer][rank][slot]
                found[expert].append(Copy(rank, slot, share))
        return found

    def validate(self, num_experts: int, slots: Sequence[int], num_layers: int | None = None) -> None:
        """Raises PlacementError unless every expert of every layer can be served and fits.

        slots: for each rank, how many experts of one layer its memory holds; 0 for a rank that is gone.
        """
        if num_layers is not None and self.num_layers != num_layers:
            raise PlacementError(f"the placement has {self.num_layers} layers, the model has {num_layers}")
        if self.shares is not None and len(self.shares) != self.num_layers:
            raise PlacementError(f"shares are given for {len(self.shares)} of {self.num_layers} layers")
        for layer, ranks in enumerate(self.layers):
            try:
                _validate_layer(ranks, num_experts, slots)
                if self.shares is not None:
                    _validate_shares(ranks, self.shares[layer])
            except PlacementError as error:
                raise PlacementError(f"layer {layer}: {error}") from None


def contiguous(num_layers: int, num_experts: int, num_ranks: int, version: int = 0) -> Placement:
    """Each rank holds the next experts in order, the first ranks one more where it does not come out even."""
    if num_layers < 0 or num_experts < 1 or num_ranks < 1:
        raise PlacementError(
            f"{num_layers} layers of {num_experts} experts on {num_ranks} ranks: give one or more"
        )
    size, more = divmod(num_experts, num_ranks)
    starts = [rank * size + min(rank, more) for rank in range(num_ranks + 1)]
    layer = tuple(tuple(range(starts[rank], starts[rank + 1])) for rank in range(num_ranks))
    return Placement(version, (layer,) * num_layers)


def moves(old: Placement, new: Placement) -> Iterator[Move]:
    """What each rank must load to go from `old` to `new`. An expert that only changes its slot is not moved.

    Bytes are moves times the bytes of one expert. Raises PlacementError where the two are of different groups.
    """
    if (old.num_layers, old.num_ranks) != (new.num_layers, new.num_ranks):
        raise PlacementError(
            f"from {old.num_layers} layers on {old.num_ranks} ranks to {new.num_layers} on {new.num_ranks}: "
            "both placements must be of the same model and group"
        )
    for layer, (before, after) in enumerate(zip(old.layers, new.layers, strict=True)):
        for rank, (held, wanted) in enumerate(zip(before, after, strict=True)):
            for expert in sorted(set(wanted).difference(held)):
                yield Move(layer, rank, expert)


def _validate_layer(ranks: LayerExperts, num_experts: int, slots: Sequence[int]) -> None:
    if len(ranks) > len(slots):
        raise PlacementError(f"unknown rank {len(slots)}: the group has ranks 0 to {len(slots) - 1}")
    if len(ranks) < len(slots):
        raise PlacementError(f"nothing is said of rank {len(ranks)}: the group has {len(slots)} ranks")
    for rank, experts in enumerate(ranks):
        if len(experts) > slots[rank]:
            raise PlacementError(
                f"rank {rank} is given {len(experts)} experts, its memory holds {slots[rank]}"
            )
        for expert, count in Counter(experts).items():
            if not 0 <= expert < num_experts:
                raise PlacementError(
                    f"rank {rank} is given expert {expert}; there are 0 to {num_experts - 1}"
                )
            if count > 1:
                raise PlacementError(f"rank {rank} is given expert {expert} {count} times; once is enough")
    missing = set(range(num_experts)).difference(*ranks)
    if missing:
        raise PlacementError(
            f"expert {min(missing)} is on no rank ({len(missing)} of {num_experts} are missing)"
        )


def _validate_shares(ranks: LayerExperts, shares: LayerShares) -> None:
    if [len(rank) for rank in shares] != [len(rank) for rank in ranks]:
        raise PlacementError("shares do not have the shape of the placement: one for each slot")
    sums: dict[int, float] = {}
    for rank, (experts, given) in enumerate(zip(ranks, shares, strict=True)):
        for expert, share in zip(experts, given, strict=True):
            if not 0 <= share <= 1:  # NaN is refused too
                raise PlacementError(
                    f"rank {rank} has a share of {share} of expert {expert}; allowed is 0 to 1"
                )
            sums[expert] = sums.get(expert, 0.0) + share
    for expert, total in sorted(sums.items()):
        if abs(total - 1) > _SUM_TOLERANCE:
            raise PlacementError(f"the shares of expert {expert} sum to {total:.6f}, not to 1")
