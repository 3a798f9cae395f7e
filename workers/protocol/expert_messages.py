"""What the ranks of an expert-parallel group and the routers tell each other, through Redis (redis_keys.expert_*).

A rank writes `ExpertRank` into a hash with every heartbeat, and appends `ExpertCounts` to its group's log. One router,
which holds a lease, posts an `ExpertPost`; ranks look at the version's own small key, and read the post when that
number is above theirs. Each rank loads what it lacks, says `ready`, and all of them switch between two steps; the
newest post is the one that counts, and takes the place of one that was never carried out.
"""

from __future__ import annotations

from msgspec import Struct

from workers.protocol.experts import Placement
from workers.protocol.messages import Role

COUNT_BYTES = 4  # of a count: little-endian uint32


class ExpertRank(Struct, frozen=True):
    """What a rank says of itself. Together the ranks of a group say all that a router has to know: nothing about a
    group lives in a router alone, or is lost with Redis."""

    group: str
    rank: int
    worker_id: str
    epoch: int  # of the worker's life
    role: Role  # of the pool that the group belongs to
    num_ranks: int  # of the group, dead ones included
    num_layers: int  # that have experts
    num_experts: int  # logical ones, in each of these layers
    expert_bytes: int  # of one expert of one layer, as the ranks hold it
    slots: int  # experts of one layer that fit into this rank's memory
    version: int  # of the placement that it computes with
    experts: list[list[int]]  # [layer][slot]: its part of that placement
    shares: list[list[float]] | None = None  # the same of the shares, where the placement has any
    node: str = ""  # ranks with the same one are near each other: a host, or a domain of NVLink
    speed: float = 1.0  # relative to the others of its group
    fetch_bytes_per_s: float = 0.0  # at which it loaded experts lately; 0: not measured yet
    ready: int = 0  # newest version for which it holds everything; at least `version`
    refused: int = 0  # newest version that it cannot carry out
    reason: str = ""  # why
    members: list[int] = []  # ranks that compute with it, itself included; empty: all


class ExpertCounts(Struct, frozen=True, array_like=True):
    """Tokens counted by one rank since its last message. A token that goes to k experts of a layer counts k times."""

    group: str
    rank: int
    worker_id: str
    epoch: int
    seq: int  # 1, 2, 3, ... within an epoch
    seconds: float  # during which they were counted
    version: int  # of the placement meanwhile
    steps: int  # of the engine, those without tokens of its own not counted
    routed: bytes  # uint32 [num_layers, num_experts]: by the logical expert that its own tokens were sent to
    computed: (
        bytes  # uint32 [num_layers, slots]: by the slot of its own that computed them, whoever sent them
    )
    expert_s: float = 0.0  # of `seconds`, how long it computed experts; 0: not measured


class ExpertPost(Struct, frozen=True):
    """A placement that ranks are asked to carry out."""

    group: str
    placement: Placement
    router_id: str  # who planned it
    at: float  # s since 1970
    why: str  # for people
