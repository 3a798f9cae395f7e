"""The ranks of an expert-parallel group as placement sees them: how fast each is, what it holds, on which node."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from workers.protocol.experts import PlacementError


class Rank(Struct, frozen=True):
    slots: int  # experts of one layer that its memory holds; 0 for a rank that is gone
    speed: float = 1.0  # relative: a rank of speed 2 serves twice the tokens in the same time
    node: int = 0


class Topology(Struct, frozen=True):
    """A group. A rank's number is its place in `ranks`; ranks that die stay in it with no slots."""

    ranks: tuple[Rank, ...]
    expert_bytes: int = 0  # weights of one expert of one layer: what one move costs on the wire

    @property
    def slots(self) -> list[int]:
        return [rank.slots for rank in self.ranks]

    @property
    def speeds(self) -> list[float]:
        return [rank.speed for rank in self.ranks]

    @property
    def nodes(self) -> list[int]:
        return [rank.node for rank in self.ranks]

    @property
    def alive(self) -> list[int]:
        return [number for number, rank in enumerate(self.ranks) if rank.slots]

    def without(self, lost: Iterable[int]) -> Topology:
        """The same group after these ranks have died."""
        gone = set(lost)
        unknown = gone.difference(range(len(self.ranks)))
        if unknown:
            raise PlacementError(
                f"unknown rank {min(unknown)}: the group has ranks 0 to {len(self.ranks) - 1}"
            )
        ranks = (
            Rank(0, rank.speed, rank.node) if number in gone else rank
            for number, rank in enumerate(self.ranks)
        )
        return Topology(tuple(ranks), self.expert_bytes)

    def validate(self, num_experts: int) -> None:
        """Raises PlacementError where no placement of so many experts can be valid."""
        for number, rank in enumerate(self.ranks):
            if rank.slots < 0:
                raise PlacementError(f"rank {number} has {rank.slots} slots; 0 or more are allowed")
            if not 0 < rank.speed < float("inf"):
                raise PlacementError(
                    f"rank {number} has a speed of {rank.speed}; it must be above 0 and finite"
                )
            if rank.node < 0:
                raise PlacementError(f"rank {number} is on node {rank.node}; nodes are counted from 0")
        total = sum(self.slots)
        if total < num_experts:
            raise PlacementError(
                f"{num_experts} experts do not fit: the {len(self.alive)} ranks that are left hold {total} in all"
            )


def uniform(
    num_ranks: int, slots: int, *, ranks_per_node: int | None = None, expert_bytes: int = 0
) -> Topology:
    """Equal ranks, `ranks_per_node` on each node (all on one unless given)."""
    per_node = ranks_per_node or num_ranks
    ranks = tuple(Rank(slots, node=number // per_node) for number in range(num_ranks))
    return Topology(ranks, expert_bytes)
