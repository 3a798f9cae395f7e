"""An expert-parallel group as a router sees it: put together from what its living ranks say of themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from router.experts.topology import Rank, Topology
from workers.protocol.expert_messages import ExpertRank
from workers.protocol.experts import Placement
from workers.protocol.messages import Role


class GroupError(ValueError):
    """Ranks of one group say things that exclude each other. The message says which and what."""


@dataclass(frozen=True)
class Group:
    name: str
    role: Role
    num_layers: int
    num_experts: int
    expert_bytes: int
    ranks: tuple[ExpertRank | None, ...]  # by number; None: dead, or not there yet

    @cached_property
    def members(self) -> frozenset[int]:
        """Ranks that compute together, as most of them say: one that was cut off may think that it is alone."""
        views = Counter(self._view(rank) for rank in self.ranks if rank is not None)
        return max(views, key=lambda view: (views[view], len(view)))

    @cached_property
    def alive(self) -> list[ExpertRank]:
        """Members that tell of themselves."""
        return [rank for rank in self.ranks if rank is not None and rank.rank in self.members]

    def _view(self, rank: ExpertRank) -> frozenset[int]:
        return frozenset(rank.members or range(len(self.ranks)))

    @property
    def missing(self) -> list[int]:
        """Members that do not tell of themselves: not there yet, or dead and still waited for by the others."""
        return [number for number in sorted(self.members) if self.ranks[number] is None]

    @property
    def version(self) -> int:
        """What all living ranks compute with: they switch together, but are read one after the other."""
        return min(rank.version for rank in self.alive)

    @property
    def newest(self) -> int:
        """No rank has heard of a later version."""
        return max(max(rank.version, rank.ready, rank.refused) for rank in self.alive)

    @property
    def settled(self) -> bool:
        """All living ranks compute with one placement, and agree who they are. They are read while they write."""
        return len({(rank.version, self._view(rank)) for rank in self.alive}) == 1

    @property
    def newcomers(self) -> list[int]:
        """Members that hold no expert: they have only just come."""
        return [rank.rank for rank in self.alive if not any(rank.experts)]

    def placement(self) -> Placement | None:
        """What the living ranks hold and compute with; the dead hold nothing. None while the ranks differ."""
        if not self.settled:
            return None
        ranks = [rank if number in self.members else None for number, rank in enumerate(self.ranks)]
        layers = tuple(
            tuple(() if rank is None else tuple(rank.experts[layer]) for rank in ranks)
            for layer in range(self.num_layers)
        )
        if all(rank.shares is None for rank in self.alive):
            return Placement(self.version, layers)
        shares = tuple(
            tuple(() if rank is None else _shares(rank, layer) for rank in ranks)
            for layer in range(self.num_layers)
        )
        return Placement(self.version, layers, shares)

    def topology(self) -> Topology:
        """Ranks that are gone have no slots."""
        nodes: dict[str, int] = {}
        ranks = (
            Rank(rank.slots, rank.speed, nodes.setdefault(rank.node, len(nodes)))
            if rank is not None and rank.rank in self.members
            else Rank(0)
            for rank in self.ranks
        )
        return Topology(tuple(ranks), self.expert_bytes)

    def is_complete(self) -> bool:
        """Every expert of every layer is on a living rank."""
        return all(
            len({expert for rank in self.alive for expert in rank.experts[layer]}) == self.num_experts
            for layer in range(self.num_layers)
        )


def _shares(rank: ExpertRank, layer: int) -> tuple[float, ...]:
    return (1.0,) * len(rank.experts[layer]) if rank.shares is None else tuple(rank.shares[layer])


def groups_of(
    reports: Iterable[ExpertRank], alive: Mapping[str, int]
) -> tuple[dict[str, Group], list[GroupError]]:
    """Groups by name, of the ranks whose worker lives. Groups that contradict themselves are left out, and told.

    alive: worker_id -> epoch of the workers that hold a lease.
    """
    by_group: dict[str, list[ExpertRank]] = {}
    for report in reports:
        if alive.get(report.worker_id) == report.epoch:
            by_group.setdefault(report.group, []).append(report)
    groups: dict[str, Group] = {}
    errors: list[GroupError] = []
    for name, members in sorted(by_group.items()):
        try:
            groups[name] = _group(name, members)
        except GroupError as error:
            errors.append(error)
    return groups, errors


def _group(name: str, members: list[ExpertRank]) -> Group:
    first = members[0]
    ranks: list[ExpertRank | None] = [None] * first.num_ranks
    for report in sorted(members, key=lambda report: report.epoch):  # the latest life of a rank stays
        _check(report, first)
        ranks[report.rank] = report
    return Group(name, first.role, first.num_layers, first.num_experts, first.expert_bytes, tuple(ranks))


def _check(report: ExpertRank, first: ExpertRank) -> None:
    who = f"group {report.group}: worker {report.worker_id}"
    for field in ("num_ranks", "num_layers", "num_experts", "expert_bytes", "role"):
        said, other = getattr(report, field), getattr(first, field)
        if said != other:
            raise GroupError(f"{who} says {field} is {said}, worker {first.worker_id} {other}")
    if not 0 <= report.rank < report.num_ranks:
        raise GroupError(f"{who} is rank {report.rank}; there are 0 to {report.num_ranks - 1}")
    if len(report.experts) != report.num_layers:
        raise GroupError(f"{who} tells of {len(report.experts)} of {report.num_layers} layers")
    if report.shares is not None and [len(layer) for layer in report.shares] != [
        len(layer) for layer in report.experts
    ]:
        raise GroupError(f"{who} gives shares that have not the shape of its experts")
    if not 0 < report.speed < float("inf"):
        raise GroupError(f"{who} has a speed of {report.speed}; it must be above 0 and finite")
