"""Groups of ranks as they would report themselves."""

from __future__ import annotations

import dataclasses

from msgspec.structs import replace

from router.experts.group import Group, groups_of
from workers.protocol.expert_messages import ExpertRank
from workers.protocol.experts import Placement, contiguous

LAYERS, EXPERTS, RANKS, SLOTS = 2, 8, 4, 3


def reports(
    placement: Placement | None = None,
    *,
    group: str = "g",
    ranks: int = RANKS,
    experts: int = EXPERTS,
    layers: int = LAYERS,
    slots: int = SLOTS,
    **more,
) -> list[ExpertRank]:
    placement = placement or contiguous(layers, experts, ranks)
    return [
        ExpertRank(
            group=group,
            rank=rank,
            worker_id=f"{group}-{rank}",
            epoch=1,
            role="decode",
            num_ranks=ranks,
            num_layers=layers,
            num_experts=experts,
            expert_bytes=1_000_000,
            slots=slots,
            version=placement.version,
            experts=[list(layer[rank]) for layer in placement.layers],
            shares=None if placement.shares is None else [list(layer[rank]) for layer in placement.shares],
            **more,
        )
        for rank in range(ranks)
    ]


def group(placement: Placement | None = None, changes: dict[int, dict] | None = None, **more) -> Group:
    """`changes`: rank -> fields that differ; None instead of fields: the rank is dead."""
    changes = changes or {}
    told = [
        replace(report, **changes.get(report.rank, {}))
        for report in reports(placement, **more)
        if changes.get(report.rank, {}) is not None
    ]
    found, errors = groups_of(told, {report.worker_id: report.epoch for report in told})
    assert not errors
    return found[told[0].group]


def renumbered(group: Group, version: int) -> Group:
    ranks = tuple(None if rank is None else replace(rank, version=version) for rank in group.ranks)
    return dataclasses.replace(group, ranks=ranks)
